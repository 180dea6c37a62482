"""What may change a session between its chunks, from any thread: another prompt, a cut, more chunks, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from longtake.errors import LongtakeError
from longtake.runtime.camera import require_cuts, steered
from longtake.runtime.conditions import SessionInputs, Tokenize
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.state import Edit, Position, Undecoded, with_edit
from longtake.runtime.story import Segment, checked_chunks, checked_prompt
from longtake.runtime.video_model import VideoModel

Record = Callable[[int], None]  # of the index of the first chunk that a live change shapes, or of the chunks in all


class LiveChanges:
    """The part of a session that other threads use while a chunk is made.

    _lock: of the position, held for a moment. _busy: a chunk is being made; _scripted: it is one of the script's.
    """

    model: VideoModel
    inputs: SessionInputs
    tokenize: Tokenize
    options: SessionOptions
    _position: Position
    _undecoded: Undecoded
    _lock: threading.Lock
    _cancelled: threading.Event
    _busy: bool
    _scripted: bool

    def _look_back(self) -> None:
        """Take a chunk back that could not be decoded."""
        raise NotImplementedError

    def _require_open(self, wanted: str) -> None:
        """Raise LongtakeError for a session that is closed."""
        raise NotImplementedError

    @property
    def next_index(self) -> int:
        """Index of the next chunk to be committed."""
        self._look_back()
        return self._position.chunk

    @property
    def position(self) -> Position:
        """Where it stands: what a journal keeps with every chunk."""
        return self._position

    @property
    def remaining(self) -> int:
        """Chunks the script still holds."""
        self._look_back()
        return self._position.left

    def change_prompt(self, prompt: str, record: Record = lambda at: None) -> int:
        """Switch the prompt at the next chunk boundary, without a cut. Returns the index of the first chunk it shapes.

        It replaces what is left of the script's current segment; later segments stay. record: is called with that index
        before the change is taken; what it raises is raised, and nothing has changed.

        Raises:
            LongtakeError: the prompt is none, the session is closed, or its script ends before that chunk.
        """
        return self.change(prompt, record=record)

    def cut(self, prompt: str | None = None, record: Record = lambda at: None) -> int:
        """Cut to a new shot at the next chunk boundary, with `prompt` if given. Returns that chunk's index.

        record, and what is raised: as in `change_prompt`.
        """
        return self.change(prompt, True, record=record)

    def steer(
        self,
        action: str | None = None,
        pose: object = None,
        velocity: object = None,
        from_chunk: int | None = None,
        target: object = None,
    ) -> int:
        """Steer the camera, in one of the ways of `camera.steered`. Returns the index of the first chunk it shapes: the next,
        or `from_chunk`. Raises LongtakeError if the model has no camera, or what is asked for cannot be."""
        self._look_back()
        with self._lock:
            self._require_open("a live change")
            at = max(self._position.chunk + self._busy, self._undecoded.first_free)
            way = {"action": action, "pose": pose, "velocity": velocity, "target": target}
            camera, first = steered(self._position.camera, at, from_chunk, **way)
            self._position = replace(self._position, camera=camera)
        return first

    def extend(
        self, chunks: int, prompt: str | None = None, cut: bool = False, record: Record = lambda total: None
    ) -> None:
        """Append `chunks` chunks to the script, of `prompt` or of its last prompt, with or without a cut before them.

        record: as in `change_prompt`, but it is called with the number of chunks that the video then has.

        Raises:
            LongtakeError: the prompt is none, the session is closed, or noise that it was given ends before that.
        """
        chunks = checked_chunks(chunks)
        if prompt:
            self._checked(prompt, "the prompt to go on with", cut)
        self._look_back()
        with self._lock:
            self._require_open("more chunks")
            here = self._position
            last = here.script[-1].prompt if here.script else here.prompt
            text = checked_prompt(prompt or last, "the prompt to go on with")
            self.inputs.require_noise(self.model.preset, here.whole + chunks)
            record(here.whole + chunks)
            self._position = replace(here, script=(*here.script, Segment(text, chunks, cut)))

    def _checked(self, prompt: str, what: str, cut: bool) -> None:
        """Raise LongtakeError unless `prompt` is one and can be encoded: else every call for its chunks would fail."""
        asked = Segment(
            checked_prompt(prompt, what), 2, cut
        )  # a cut's second chunk reads the prompt without its prefix
        self.inputs.check(self.model.preset, (asked,), None, self.tokenize)

    def cancel(self) -> None:
        """Stop before the next pass: iteration raises CancelledError once, and nothing of that chunk is committed."""
        self._cancelled.set()

    def change(
        self,
        prompt: str | None = None,
        cut: bool = False,
        camera: Mapping[str, Any] | None = None,
        record: Record = lambda at: None,
    ) -> int:
        """Another prompt, a cut and a way of the camera (as in `steer`), all at the next chunk boundary. Returns that chunk's index.

        record, and what is raised: as in `change_prompt`; also if the model has no cuts, or no camera.
        """
        if cut:
            require_cuts(self.model.family.can, "a cut")
        if prompt is not None:
            self._checked(prompt, "the new shot's prompt" if cut else "the new prompt", cut)
        self._look_back()
        with self._lock:
            self._require_open("a live change")
            at = max(self._position.chunk + self._busy, self._undecoded.first_free)
            before = at - self._position.chunk - (self._busy and not self._scripted)
            if self._position.left <= before and not self.options.endless:
                what = f"the script ends before chunk {at}"
                expected, fix = "a chunk still to come", "call extend first, or start the session with endless=True"
                raise LongtakeError(what, got="a live change that nothing would show", expected=expected, fix=fix)
            after = self._position
            if camera is not None:
                after = replace(after, camera=steered(after.camera, at, **camera)[0])
            if prompt is not None or cut:
                after = replace(after, edits=with_edit(after.edits, Edit(at, prompt, cut)))
            record(at)
            self._position = after
        return at
