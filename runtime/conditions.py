"""What a chunk is conditioned on: prompt, timesteps, positions, noise. Worked out on the host, then moved once.

A caller may bring noise and text embeddings in place of what a session makes of seed and prompts.

Legend: F latent frames of a chunk, C channels, H, W latent size, E text length, D text width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from longtake.errors import LongtakeError
from longtake.runtime.story import Segment
from longtake.runtime.video_model import Tensors, VideoModel
from longtake.training.models.network_spec import NetworkSpec
from longtake.training.models.presets import Preset
from longtake.training.models.sampler import noise_for_chunk
from longtake.training.models.text.words import Tokenizer
from longtake.training.models.wan.prompts import CUT_PREFIX

MOST_EMBEDDINGS = 16  # prompts whose text embeddings are kept, in host memory: 8 MB each for the 5B model

Tokenize = Callable[[list[str], int], Tensor]
Noise = Callable[[int], Tensor] | Tensor  # of a chunk's index, [1, F, C, H, W]; or the whole video's, chunk after chunk
Embeddings = Mapping[str, Tensor] | Tensor  # by prompt, or one for every prompt: [1, E, D] or [E, D], of E rows at most

DTYPES = {"fp32": torch.float32, "int32": torch.int32}  # of conditions; what is computed from them may be anything


@dataclass(frozen=True)
class SessionInputs:
    """noise, embeddings: see above; None: made of seed and prompt."""

    noise: Noise | None = None
    embeddings: Embeddings | None = None

    def __post_init__(self) -> None:
        """Raise LongtakeError for noise that is none."""
        if not (self.noise is None or isinstance(self.noise, Tensor) or callable(self.noise)):
            expected, fix = "a function of a chunk's index, or a tensor", "pass torch.as_tensor(noise) for an array"
            raise LongtakeError("this is no noise", got=_shape(self.noise), expected=expected, fix=fix)

    def require_noise(self, preset: Preset, chunks: int, endless: bool = False) -> None:
        """Raise LongtakeError unless noise in one tensor holds that of `chunks` chunks. Of a function nobody knows."""
        if isinstance(self.noise, Tensor) and endless:
            what, fix = "noise in one tensor ends, an endless session does not", "pass noise as a function"
            raise LongtakeError(what, got=_shape(self.noise), expected="a function of a chunk's index", fix=fix)
        if isinstance(self.noise, Tensor) and chunks:
            self._noise(preset, chunks - 1)

    def check(self, preset: Preset, script: Sequence[Segment], negative: str | None, tokenize: Tokenize) -> None:
        """Raise LongtakeError where embeddings don't suffice for `script`, or a small text encoder knows few of its words.

        negative: the prompt of a guided session.
        """
        if isinstance(self.embeddings, Tensor) and negative is not None:
            what = "guidance needs embeddings of the negative prompt, too"
            fix = f"pass embeddings={{prompt: tensor, {negative!r}: tensor}}, or guidance=1"
            raise LongtakeError(what, got="one tensor for every prompt", expected="embeddings by prompt", fix=fix)
        if self.embeddings is not None:
            texts = [CUT_PREFIX * segment.cut + segment.prompt for segment in script]
            texts += [segment.prompt for segment in script if segment.chunks > 1]
            for text in texts if negative is None else [*texts, negative]:
                self._embedding(preset, text)
        elif isinstance(tokenize, Tokenizer):
            texts = [*dict.fromkeys(segment.prompt for segment in script), *([negative] if negative else [])]
            tokenize.check(texts)
            for text in texts:
                tokenize.check([text])

    def noise_of(self, preset: Preset, seed: int) -> Callable[[int], Tensor]:
        """Noise of a chunk, fp32 [1, F, C, H, W], on the CPU."""
        return partial(noise_for_chunk, preset, seed) if self.noise is None else partial(self._noise, preset)

    def embedding_of(self, model: VideoModel, tokenize: Tokenize) -> Callable[[str], Tensor]:
        """Embeddings of a prompt, fp32 [1, E, D], rows of padding zero."""
        if self.embeddings is not None:
            return partial(self._embedding, model.preset)
        return lambda prompt: model.text(tokenize([prompt], model.preset.text.length).to(model.device))

    def _noise(self, preset: Preset, chunk: int) -> Tensor:
        first, frames = preset.first_frame(chunk), preset.frames_of(chunk)
        given = self.noise[:, first : first + frames] if isinstance(self.noise, Tensor) else self.noise(chunk)  # type: ignore[misc]
        wanted = (1, frames, preset.vae.z_channels, *preset.latent_hw)
        if not isinstance(given, Tensor) or tuple(given.shape) != wanted:
            whole = f"; of the video {tuple(self.noise.shape)}" if isinstance(self.noise, Tensor) else ""
            what = f"the noise of chunk {chunk} does not fit"
            fix = "pass a chunk's noise for each index, or the whole video's, chunk after chunk along F"
            raise LongtakeError(what, got=f"{_shape(given)}{whole}", expected=f"{wanted}: [1, F, C, H, W]", fix=fix)
        return given.detach().to("cpu", torch.float32, copy=True)

    def _embedding(self, preset: Preset, prompt: str) -> Tensor:
        given = self.embeddings
        if isinstance(given, Mapping):
            given = given.get(prompt, given.get(prompt.removeprefix(CUT_PREFIX)))
        if given is None:
            expected, fix = f"one of {', '.join(map(repr, self.embeddings or ()))}", "add it to embeddings"
            raise LongtakeError("no embeddings of this prompt were given", got=repr(prompt), expected=expected, fix=fix)
        rows, (length, width) = given, (preset.dit.text_len, preset.dit.text_dim)
        if isinstance(rows, Tensor) and rows.ndim == 2:
            rows = rows[None]
        if not isinstance(rows, Tensor) or rows.ndim != 3 or rows.shape[::2] != (1, width) or rows.shape[1] > length:
            expected = f"(1, {length}, {width}) or fewer rows: [1, E, D]"
            fix = "pass what the text encoder makes of the prompt"
            raise LongtakeError("these embeddings do not fit", got=_shape(given), expected=expected, fix=fix)
        return functional.pad(rows.detach().to(torch.float32), (0, 0, 0, length - rows.shape[1]))


OWN = SessionInputs()


def _shape(given: object) -> object:
    return tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__


@dataclass(frozen=True)
class Conditions:
    """Tensors of one chunk, by the names of the transformer's inputs.

    fixed: what the chunk alone decides. context and negative: what a prompt does (negative: only under CFG).
    """

    fixed: Tensors
    context: Tensors
    negative: Tensors | None
    noise_BCFHW: Tensor


class Conditioner:
    """Builds a session's conditions; keeps the last prompt's context and the constant tensors on the device."""

    def __init__(
        self,
        model: VideoModel,
        embedding: Callable[[str], Tensor],
        noise: Callable[[int], Tensor],
        negative_prompt: str | None,
        timesteps: Sequence[float],
    ) -> None:
        """`embedding`: of a prompt, fp32 [1, E, D]. `noise`: of a chunk, fp32 [1, F, C, H, W]."""
        self.model, self.embedding, self.noise, self.negative_prompt = model, embedding, noise, negative_prompt
        lengths = {model.preset.frames_of(0), model.preset.chunk_latents}
        self._times = {
            (t, clean, frames): self._pass_inputs(t, clean, frames)
            for t, clean, frames in product((*timesteps, 0), (0, 1), lengths)
        }
        self._kept: dict[str, Tensors] = {}
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def for_chunk(self, chunk: int, shot: int, prompt: str, cameras: tuple[Tensor, Tensor] | None = None) -> Conditions:
        """Conditions of chunk `chunk` in shot `shot`; `prompt` is the text to encode. cameras: poses and intrinsics of the
        chunk's frames, of a model that has such."""
        model = self.model
        context, negative = self._contexts(prompt)
        fixed = self._moved(model.family.chunk_inputs(model.preset, chunk, shot))
        if cameras is not None:
            fixed = {**fixed, **self._cameras(chunk, *cameras)}
        noise = self.noise(chunk).transpose(1, 2).contiguous()
        return Conditions(fixed, context, negative, noise.to(model.device))

    def _cameras(self, chunk: int, poses: Tensor, intrinsics: Tensor) -> Tensors:
        """What the chunk's cameras give: as it is, and through network "camera", once for all passes."""
        model = self.model
        inputs = dict(model.family.camera_inputs(model.preset, chunk, poses, intrinsics))  # type: ignore[attr-defined]
        maps = {binding.name: inputs.pop(binding.name) for binding in model.backend.specs["camera"].inputs}
        return {**self._moved(inputs), **model.camera({name: maps[name].to(model.device) for name in maps})}

    def times(self, chunk: int, timestep: float, clean_frames: int = 0) -> Tensors:
        """The inputs of a pass at `timestep`, the first `clean_frames` (0 or 1) of whose latents are clean."""
        return self._times[timestep, clean_frames, self.model.preset.frames_of(chunk)]

    def forget(self) -> None:
        """Drop everything that is kept of prompts."""
        self._kept.clear()
        self._embeddings.clear()

    def _contexts(self, prompt: str) -> tuple[Tensors, Tensors | None]:
        """Encode what is not kept already; keep these prompts only (a large model's context is large)."""
        wanted = [prompt] if self.negative_prompt is None else [prompt, self.negative_prompt]
        # What is not needed goes first: at no time are there more contexts on the device than one chunk has.
        self._kept = {text: self._kept[text] for text in wanted if text in self._kept}
        for text in wanted:
            if text not in self._kept:
                self._kept[text] = self.model.context(self._embedding(text))
        negative = None if self.negative_prompt is None else self._kept[self.negative_prompt]
        return self._kept[prompt], negative

    def _embedding(self, prompt: str) -> Tensor:
        """Text embeddings of `prompt` on the device; those of the last MOST_EMBEDDINGS prompts are not computed again."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.embedding(prompt).to("cpu", copy=True)
            if len(self._embeddings) > MOST_EMBEDDINGS:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt].to(self.model.device)

    def _pass_inputs(self, timestep: float, clean_frames: int, frames: int) -> Tensors:
        return self._moved(self.model.family.pass_inputs(self.model.preset, frames, timestep, clean_frames))

    def _moved(self, tensors: Mapping[str, Tensor]) -> Tensors:
        check_fit(tensors, self.model.backend.specs["dit"])
        return {name: tensor.to(self.model.device) for name, tensor in tensors.items()}


def check_fit(tensors: Mapping[str, Tensor], spec: NetworkSpec) -> None:
    """Raise LongtakeError for a tensor that is no input of `spec`, or of another dtype or shape; a word fits any size."""
    bindings = {binding.name: binding for binding in spec.inputs}
    for name, tensor in tensors.items():
        if name not in bindings:
            what, got = f"network {spec.name} has no input {name}", f"a chunk's condition {name}"
            raise LongtakeError(what, got=got, expected=", ".join(bindings), fix="see the family's spec")
        wanted = bindings[name]
        sizes = tuple(n if isinstance(n, int) else m for n, m in zip(wanted.shape, tensor.shape, strict=False))
        if (len(wanted.shape), sizes, DTYPES[wanted.dtype]) != (tensor.ndim, tuple(tensor.shape), tensor.dtype):
            what = f"a chunk's condition {name} does not fit network {spec.name}"
            got, expected = f"{tensor.dtype} {tuple(tensor.shape)}", f"{wanted.dtype} {wanted.shape}"
            raise LongtakeError(what, got=got, expected=expected, fix="see the family's chunk_inputs and pass_inputs")
