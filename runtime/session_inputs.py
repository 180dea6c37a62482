"""What a caller may bring in place of what a session makes of seed and prompts: noise, and text embeddings.

Legend: F latent frames of a chunk, C latent channels, H, W latent size, E text length, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from longtake.errors import LongtakeError
from longtake.runtime.story import Segment
from longtake.runtime.video_model import VideoModel
from longtake.training.models.noise import noise_for_chunk
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import Tokenizer
from longtake.training.models.wan.prompts import CUT_PREFIX

Tokenize = Callable[[list[str], int], Tensor]
Noise = Callable[[int], Tensor] | Tensor  # of a chunk's index, [1, F, C, H, W]; or the whole video's, chunk after chunk
Embeddings = Mapping[str, Tensor] | Tensor  # by prompt, or one for every prompt: [1, E, D] or [E, D], of E rows at most


@dataclass(frozen=True)
class SessionInputs:
    """noise, embeddings: see above; None: made of seed and prompt."""

    noise: Noise | None = None
    embeddings: Embeddings | None = None

    def check(self, preset: Preset, script: Sequence[Segment], negative: str | None, tokenize: Tokenize) -> None:
        """Raise LongtakeError where they don't suffice for `script`, or a small text encoder knows few of its words.

        negative: the prompt of a guided session.
        """
        if isinstance(self.noise, Tensor):
            self._noise(preset, sum(segment.chunks for segment in script) - 1)
        if isinstance(self.embeddings, Tensor) and negative is not None:
            raise LongtakeError("guidance needs embeddings of the negative prompt, too", got="one tensor for every prompt",
                                expected="embeddings by prompt",
                                fix=f"pass embeddings={{prompt: tensor, {negative!r}: tensor}}, or guidance=1")  # fmt: skip
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
            raise LongtakeError(f"the noise of chunk {chunk} does not fit", got=f"{_shape(given)}{whole}",
                                expected=f"{wanted}: [1, F, C, H, W]", fix="pass a chunk's noise for each index, or the "
                                "whole video's, chunk after chunk along F")  # fmt: skip
        return given.detach().to("cpu", torch.float32, copy=True)

    def _embedding(self, preset: Preset, prompt: str) -> Tensor:
        given = self.embeddings
        if isinstance(given, Mapping):
            given = given.get(prompt, given.get(prompt.removeprefix(CUT_PREFIX)))
        if given is None:
            raise LongtakeError("no embeddings of this prompt were given", got=repr(prompt), expected="one of "
                                f"{', '.join(map(repr, self.embeddings or ()))}", fix="add it to embeddings")  # fmt: skip
        rows, (length, width) = given, (preset.dit.text_len, preset.dit.text_dim)
        if isinstance(rows, Tensor) and rows.ndim == 2:
            rows = rows[None]
        if not isinstance(rows, Tensor) or rows.ndim != 3 or rows.shape[::2] != (1, width) or rows.shape[1] > length:
            raise LongtakeError("these embeddings do not fit", got=_shape(given), expected=f"(1, {length}, {width}) or fewer "
                                "rows: [1, E, D]", fix="pass what the text encoder makes of the prompt")  # fmt: skip
        return functional.pad(rows.detach().to(torch.float32), (0, 0, 0, length - rows.shape[1]))


OWN = SessionInputs()


def _shape(given: object) -> object:
    return tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
