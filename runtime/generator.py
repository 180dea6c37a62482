"""The front door: open engines, pick a backend and say which, start sessions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from longtake.runtime.backends.base import Backend
from longtake.runtime.conditions import Tokenize
from longtake.runtime.errors import LongtakeError
from longtake.runtime.session import Session, SessionOptions
from longtake.runtime.snapshot import snapshot_from_file
from longtake.runtime.sources import backend_from_source, source_from_name
from longtake.runtime.story import Segment, Story, check_fits, checked_prompt, story_from_file

Script = Story | Path | str | list[str] | tuple[Segment, ...]


class Generator:
    """One model on one device, ready to generate. Sessions made from it share its engines, not their state."""

    def __init__(self, backend: Backend, tokenize: Tokenize) -> None:
        self.backend, self._tokenize = backend, tokenize

    @classmethod
    def from_engines(
        cls, engines: Path | str | None = None, backend: str = "auto", device: torch.device | str | None = None
    ) -> Generator:
        """Open a folder of engines or of exported networks, or a recipe by name; None takes the best one that is there.

        Args:
            engines: folder with bundle.json (engines) or export.json (ONNX), or the name of a recipe.
            backend: "auto" chooses and says why; "fused", "segmented" or "reference" is taken or refused, never replaced.
            device: such as "cuda:0"; the backend's own choice if None.

        Raises:
            LongtakeError: nothing is there, or the name is unknown.
            UnavailableError: the backend asked for cannot run here.
            IntegrityError: a file is damaged or was swapped.
        """
        source = source_from_name(engines)
        opened = backend_from_source(source, backend, device)
        return cls(opened, partial(_tokenize, vocabulary=source.vocabulary))

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
    ) -> Session:
        """Start a video.

        Args:
            script: a story, the path of one, a list of prompts (one a chunk, no cuts), or segments.
            seed, steps, guidance, negative_prompt: override the story's, which override the preset's.
            chunks: total length; longer than the script continues its last prompt, shorter ends it early.
            decode: False yields latents only.
            endless: go on with the last prompt when the script ends.

        Raises:
            LongtakeError: the story is malformed or does not fit the preset.
        """
        story = story_from_script(script)
        preset = self.backend.preset
        check_fits(story, preset)
        options = SessionOptions(
            seed=_first(seed, story.seed),
            steps=_first(steps, story.steps, preset.sampling.steps),
            guidance=float(_first(guidance, story.guidance, preset.sampling.guidance)),
            negative_prompt=_first(negative_prompt, story.negative_prompt, preset.negative_prompt),
            shift=preset.sampling.shift,
            decode=decode,
            endless=endless,
        )
        segments = story.segments if chunks is None else fit_segments(story.segments, chunks)
        return Session(self.backend, self._tokenize, segments, options)

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
        session = Session(self.backend, self._tokenize, (), options)
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


def story_from_script(script: Script) -> Story:
    """A story from whatever `Generator.session` takes."""
    if isinstance(script, Story):
        return script
    if isinstance(script, (str, Path)):
        return story_from_file(script)
    if not script:
        raise LongtakeError("the script is empty", got=repr(script), expected="at least one prompt")
    parts = [p if isinstance(p, Segment) else Segment(p) for p in script]
    for i, part in enumerate(parts):
        checked_prompt(part.prompt, f"prompt {i} of the script")
    return Story("script", tuple(parts))


def fit_segments(segments: tuple[Segment, ...], chunks: int) -> tuple[Segment, ...]:
    """`segments` cut short or continued to `chunks` chunks in all."""
    if chunks < 1:
        raise LongtakeError("bad number of chunks", got=chunks, expected="1 or more", fix="pass --chunks 2")
    fitted: list[Segment] = []
    left = chunks
    for segment in segments:
        if left <= 0:
            break
        fitted.append(Segment(segment.prompt, min(segment.chunks, left), segment.cut))
        left -= fitted[-1].chunks
    if left > 0:
        fitted.append(Segment(fitted[-1].prompt, left))
    return tuple(fitted)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _tokenize(texts: list[str], length: int, vocabulary: tuple[str, ...] | None) -> torch.Tensor:
    from longtake.training.text_encoder import tokenize

    return tokenize(texts, length, vocabulary)
