"""The front door: open engines, pick a backend and say which, start sessions."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.formats.memory import Budget
from longtake.formats.model_name import checkpoints_named
from longtake.runtime.backends.base import Backend
from longtake.runtime.camera_files import DEFAULT_FIELD
from longtake.runtime.clip import latents_from_clip, latents_from_frames
from longtake.runtime.conditions import Embeddings, Noise, SessionInputs, Tokenize
from longtake.runtime.sampling import OnStep, checked_on_step
from longtake.runtime.session import Session
from longtake.runtime.session_options import Sampling, SessionOptions, sampling_of
from longtake.runtime.snapshot import snapshot_from_file
from longtake.runtime.sources import (
    NOTHING_SPECIAL,
    OpenOptions,
    backend_from_source,
    require_checkpoints,
    source_from_name,
)
from longtake.runtime.start import NO_VIEW, Clip, Picture, Request, Start, camera_of, take_in, world_of
from longtake.runtime.story import Script, Segment, check_fits
from longtake.runtime.video_model import VideoModel
from longtake.runtime.view import View
from longtake.training.models.families import preset_named
from longtake.training.models.presets import SamplingConfig

log = logging.getLogger(__name__)


class Generator:
    """One model on one device, ready to generate. Sessions made from it share its engines, not their state."""

    def __init__(
        self,
        backend: Backend,
        tokenize: Tokenize,
        budget: Budget | None = None,
        sampling: SamplingConfig | None = None,
    ) -> None:
        """`budget`: the GPU memory that was announced for `backend`, if any was. `sampling`: the preset's if None."""
        self.backend, self.tokenize, self.budget = backend, tokenize, budget
        self.model = VideoModel(backend)
        self.sampling = sampling or backend.preset.sampling

    @classmethod
    def from_engines(
        cls,
        engines: Path | str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        decode_device: torch.device | str | None = None,
        opening: OpenOptions = NOTHING_SPECIAL,
        checkpoints: Path | None = None,
    ) -> Self:
        """Open a folder of engines or of exported networks, or a recipe by name; None takes the best one that is there.

        Args:
            engines: folder with bundle.json (engines) or export.json (ONNX), or the name of a recipe.
            backend: "auto" chooses and says why; "fused", "segmented" or "reference" is taken or refused, never replaced.
            device: such as "cuda:0"; the backend's own choice if None.
            decode_device: another GPU for the VAE; the same if None.
            opening: what it will be used for, which its memory follows from, and who is told.
            checkpoints: folder of a text or VAE encoder that was not exported; by default what the export was made from.

        Raises:
            LongtakeError: nothing is there, the name is unknown, or the GPU's memory does not suffice.
            UnavailableError: the backend asked for cannot run here.
            IntegrityError: a file is damaged or was swapped.
            GateError: the export failed its comparison with PyTorch, and `opening.force` isn't given.
        """
        from longtake.training.models.text.words import tokenizer_for

        source = source_from_name(engines)
        opening.known(source.recipe.model)
        if line := source.checked.require(source.onnx, opening.force):
            opening.say(line)
        if checkpoints is not None:
            source = replace(source, checkpoints=require_checkpoints(checkpoints))
        tokenizer = tokenizer_for(source.recipe.model, source.vocabulary, source.onnx)
        announced: list[Budget] = []

        def announce(budget: Budget) -> None:
            announced.append(budget)
            opening.announce(budget)

        told = replace(opening, announce=announce)
        opened = backend_from_source(source, backend, device, decode_device, told)
        opened.made_of = {"model": source.model, "export": vars(source.checked)}
        return cls(opened, tokenizer, announced[0] if announced else None, source.sampling)

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path | str,
        backend: str = "torch",
        dtype: str | None = None,
        device: torch.device | str | None = None,
        gpus: int = 1,
    ) -> Self:
        """Open a folder of checkpoints, or a shipped model's by its name: a DiT; its text encoder and VAE if they are there.

        With a DiT alone, sessions need `embeddings` and `decode=False`.

        Args:
            backend: "torch" runs the checkpoints as they are; "reference" the export in bf16 that was made of them.
            dtype: of "torch", "fp32" (the default: no rounding to bf16 anywhere) or "bf16". Of "reference", "bf16": it stores
                weights so, and computes in fp32.
            device: of "torch", such as "cuda:0"; the CPU if None.
            gpus: of "torch": how many GPUs share a video; with device "cpu", processes over gloo.

        Raises:
            LongtakeError: there is no DiT, or backend or dtype are none of these.
            UnavailableError: nothing was exported from it.
            IntegrityError: a file is damaged or was swapped.
        """
        from longtake.runtime.checkpoints import checkpoint_backend, dit_side, export_of, tokenizer_of

        folder = checkpoints_named(str(folder))
        side = dit_side(folder)
        preset = preset_named(side.preset)
        if backend == "torch":
            opened = checkpoint_backend(preset, folder, dtype or "fp32", device, gpus)
            return cls(opened, tokenizer_of(preset, folder), sampling=side.sampled)
        if backend != "reference":
            what, expected = "a checkpoint has no such backend", "'torch' or 'reference'"
            fix = "for the others: longtake export and longtake engines, then Generator.from_engines"
            raise LongtakeError(what, got=repr(backend), expected=expected, fix=fix)
        if dtype not in (None, "bf16"):
            what, got = "an export stores its weights in bf16", f"dtype {dtype!r}"
            raise LongtakeError(what, got=got, expected="dtype 'bf16'", fix="pass backend='torch' for fp32")
        return cls.from_engines(export_of(preset, folder), "reference", device)

    def session(
        self,
        script: Script,
        seed: int | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampling: Sampling | None = None,
        noise: Noise | None = None,
        embeddings: Embeddings | None = None,
        negative_prompt: str | None = None,
        chunks: int | None = None,
        decode: bool = True,
        endless: bool = False,
        retakes: bool = False,
        image: Picture | None = None,
        continue_from: Clip | None = None,
        clip: Script | None = None,
        on_step: OnStep | None = None,
        view: View = NO_VIEW,
    ) -> Session:
        """Start a video.

        Args:
            script: a prompt, for `chunks` chunks; a list of prompts, one a chunk; a story, segments, the path of a story
                (a string that ends in .yaml or .json) or the name of a shipped one. A prompt that begins with CUT_PREFIX
                ("The scene transitions. ") is a cut.
            seed: overrides the story's, which overrides the preset's; so do `steps`, `guidance` and `negative_prompt`.
            sampling: steps and guidance, timesteps, shift and solver in one; takes the place of `steps` and `guidance`.
            noise: of chunks in place of the seed's: a function of a chunk's index that gives [1, F, C, H, W], or one tensor,
                the whole video's, chunk after chunk along F.
            embeddings: of prompts in place of the text encoder's: by prompt, or one tensor for every prompt, [1, E, D]. A
                prompt at a cut is looked up with its CUT_PREFIX first.
            chunks: total length; longer than the script continues its last prompt, shorter ends it early.
            decode: False yields latents only.
            endless: go on with the last prompt when the script ends.
            image: a picture that is the first frame (a `Picture`); overrides the story's.
            retakes: keep the latents of every chunk in the host's memory, so that `Session.retake` can go back.
            continue_from: a video, or a file or tensor [1, F, C, h, w] of latents, to go on from; overrides the story's.
                Its chunks are taken in before this returns: the first chunk that comes is the first new one.
            clip: what is seen in that clip, made as long as it (default: the story's, else the first prompt).
            on_step: is called with a `Step` after every denoise step, in the thread that asked for the chunk.
            view: where the camera goes, of a model with cameras; what it leaves open is the story's.

        Raises:
            LongtakeError: the story is malformed or does not fit the preset, or what is given for it cannot be used.
        """
        # A test compares the names.
        asked = Request(**{name: given for name, given in locals().items() if name != "self"})
        start = asked.start
        check_fits(asked.story, self.backend.preset, continued=start.clip is not None)
        options, segments = self._options(asked), asked.segments
        checked_on_step(on_step)
        start, view = world_of(asked.story, start, view, self.backend.preset)
        if "camera" in self.model.family.can and asked.start.image is None:
            log.warning("no picture was given: the video starts from %s", start.image)
        return self._started(start, options, segments, SessionInputs(noise, embeddings), view, on_step)

    def _started(
        self,
        start: Start,
        options: SessionOptions,
        segments: tuple[Segment, ...],
        inputs: SessionInputs,
        view: View,
        on_step: OnStep | None,
    ) -> Session:
        """A session once everything is known; what can be refused is refused before anything is allocated."""
        preset = self.backend.preset
        inputs.check(preset, segments, options.negative, self.tokenize)
        camera = camera_of(view, start, preset, segments, options.endless)
        if camera is not None and view.intrinsics is None:
            log.warning("no intrinsics: a camera is assumed that sees %g degrees across", DEFAULT_FIELD)
        first, clip_latents = start.encoded(self.model)  # before the caches are allocated
        taken_in = 0 if clip_latents is None else preset.whole_chunks(clip_latents.shape[1])
        inputs.require_noise(preset, taken_in + sum(segment.chunks for segment in segments), options.endless)
        session = Session(self.model, self.tokenize, segments, options, first, inputs, on_step, camera)
        session.told = {**start.told, **({} if camera is None else view.told)}
        return take_in(session, clip_latents, start.segments)

    def _options(self, request: Request) -> SessionOptions:
        """What is asked for, else the story's, else the checkpoint's."""
        story, asked = request.story, sampling_of(request.sampling, request.steps, request.guidance)
        own = self.backend.preset.sampling.listed
        told = asked.steps or story.steps or self.sampling.steps
        listed = own if asked.shift is None and told == len(own) else ()
        timesteps = asked.timesteps or listed
        return SessionOptions(
            seed=_first(request.seed, story.seed),
            steps=len(timesteps) or _first(asked.steps, story.steps, self.sampling.steps),
            guidance=_first(asked.guidance, story.guidance, self.sampling.guidance),
            negative_prompt=_first(request.negative_prompt, story.negative_prompt, self.backend.preset.negative_prompt),
            shift=_first(asked.shift, 1.0 if timesteps else self.sampling.shift),
            solver=_first(asked.solver, self.model.family.solver),
            timesteps=timesteps,
            decode=request.decode,
            endless=request.endless,
            retakes=request.retakes,
        )

    def __repr__(self) -> str:
        preset, backend = self.backend.preset, self.backend
        name = str(backend.made_of.get("model") or preset.name)
        state = "closed" if self.model.closed else f"{backend.name} backend on {backend.device}"
        return f"<Generator {name}@{backend.recipe.name}: {state}, {preset.width}x{preset.height} at {preset.fps} a second>"

    @property
    def fps(self) -> int:
        """Video frames a second."""
        return self.backend.preset.fps

    def encode(self, video: Path | str | np.ndarray[Any, Any]) -> Tensor:
        """Latents fp32 [1, F, C, h, w] of frames: uint8 [T, H, W, 3] at the model's rate, or a video file.

        Frames are resized; of what is not a whole number of chunks the end is left out. `session(continue_from=...)`
        and `feed` take the latents.

        Raises:
            LongtakeError: too short, not frames, or the model cannot encode.
        """
        return (latents_from_clip if isinstance(video, (str, Path)) else latents_from_frames)(video, self.model)  # type: ignore[arg-type]

    def load_session(
        self,
        path: Path | str,
        *,
        decode: bool = True,
        endless: bool = False,
        noise: Noise | None = None,
        embeddings: Embeddings | None = None,
    ) -> Session:
        """Continue a session saved by `Session.save`, at the chunk, seed and sampling it had.

        `noise`, `embeddings`: of a session that was given them, see `session`.

        Raises:
            LongtakeError: it is of another preset or model, or was given noise or embeddings and is not now.
            IntegrityError: the file is damaged.
        """
        snapshot = snapshot_from_file(path)
        saved = snapshot.identity
        options = SessionOptions(
            seed=saved.seed, steps=saved.steps, guidance=saved.guidance, negative_prompt=saved.negative_prompt,
            shift=saved.shift, decode=decode, endless=endless, solver=saved.solver, timesteps=saved.timesteps,
        )  # fmt: skip
        session = Session(self.model, self.tokenize, (), options, inputs=SessionInputs(noise, embeddings))
        try:
            session.restore(snapshot)
        except BaseException:
            session.close()
            raise
        return session

    def close(self) -> None:
        """Release the engines. Sessions made from it yield no more chunks."""
        self.model.closed = True
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
