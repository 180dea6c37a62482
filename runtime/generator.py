"""The front door: open engines, pick a backend and say which, start sessions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longtake.formats.memory import Budget
from longtake.runtime.backends.base import Backend
from longtake.runtime.conditions import Tokenize
from longtake.runtime.session import Session
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.snapshot import snapshot_from_file
from longtake.runtime.sources import (
    NOTHING_SPECIAL,
    OpenOptions,
    backend_from_source,
    require_checkpoints,
    source_from_name,
)
from longtake.runtime.start import Clip, Picture, start_of, take_in
from longtake.runtime.story import Script, check_fits, fit_segments, story_from_script
from longtake.runtime.video_model import VideoModel
from longtake.training.models.presets import SamplingConfig


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
        self.backend, self._tokenize, self.budget = backend, tokenize, budget
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
    ) -> Generator:
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
        """
        from longtake.training.models.text.words import tokenizer_for

        source = source_from_name(engines)
        if checkpoints is not None:
            source = replace(source, checkpoints=require_checkpoints(checkpoints))
        tokenizer = tokenizer_for(source.recipe.model, source.vocabulary, source.onnx)
        announced: list[Budget] = []

        def announce(budget: Budget) -> None:
            announced.append(budget)
            opening.announce(budget)

        told = replace(opening, announce=announce)
        opened = backend_from_source(source, backend, device, decode_device, told)
        return cls(opened, tokenizer, announced[0] if announced else None, source.sampling)

    def session(
        self,
        script: Script,
        seed: int | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        chunks: int | None = None,
        decode: bool = True,
        endless: bool = False,
        image: Picture | None = None,
        continue_from: Clip | None = None,
        clip: Script | None = None,
    ) -> Session:
        """Start a video.

        Args:
            script: a story, the path of one, segments, or a list of prompts, one a chunk; a prompt that begins with
                CUT_PREFIX ("The scene transitions. ") is a cut.
            seed, steps, guidance, negative_prompt: override the story's, which override the preset's.
            chunks: total length; longer than the script continues its last prompt, shorter ends it early.
            decode: False yields latents only.
            endless: go on with the last prompt when the script ends.
            image: a picture, file or uint8 [H, W, 3], that is the first frame; overrides the story's.
            continue_from: a video, or a file or tensor [1, F, C, h, w] of latents, to go on from; overrides the story's.
                Its chunks are taken in before this returns: the first chunk that comes is the first new one.
            clip: what is seen in that clip; cut short or continued to its length (default: the story's, else what the
                first prompt of `script` says).

        Raises:
            LongtakeError: the story is malformed or does not fit the preset, or the picture or clip cannot be used.
        """
        preset = self.backend.preset
        story = story_from_script(script)
        start = start_of(story, image, continue_from, clip)
        check_fits(story, preset, continued=start.clip is not None)
        options = SessionOptions(
            seed=_first(seed, story.seed),
            steps=_first(steps, story.steps, self.sampling.steps),
            guidance=float(_first(guidance, story.guidance, self.sampling.guidance)),
            negative_prompt=_first(negative_prompt, story.negative_prompt, preset.negative_prompt),
            shift=self.sampling.shift,
            decode=decode,
            endless=endless,
        )
        segments = story.segments if chunks is None else fit_segments(story.segments, chunks)
        first, clip_latents = start.encoded(self.model)  # before the caches are allocated
        session = Session(self.model, self._tokenize, segments, options, first)
        if clip_latents is not None:
            take_in(session, clip_latents, start.segments)
        return session

    def load_session(self, path: Path | str, *, decode: bool = True, endless: bool = False) -> Session:
        """Continue a session saved by `Session.save`, at the chunk, seed and sampling it had.

        Raises:
            LongtakeError: it is of another preset or model.
            IntegrityError: the file is damaged.
        """
        snapshot = snapshot_from_file(path)
        saved = snapshot.identity
        options = SessionOptions(
            seed=saved.seed, steps=saved.steps, guidance=saved.guidance, negative_prompt=saved.negative_prompt,
            shift=saved.shift, decode=decode, endless=endless,
        )  # fmt: skip
        session = Session(self.model, self._tokenize, (), options)
        try:
            session.restore(snapshot)
        except BaseException:
            session.close()
            raise
        return session

    def close(self) -> None:
        """Release the engines."""
        self.backend.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
