"""What a session carries from chunk to chunk: a position (small, immutable) and state (tensors, in place).

A chunk stages its changes and commits them in one assignment when it is whole; until then nothing a retry would read
has changed.

Chunks that are committed and handed over are perhaps not decoded. Going back to before the newest one is like any other
failed chunk: what its attempt wrote, nobody reads, and it is generated again. An older one cannot be generated again, because
the chunk after it has already written over a slot that it read. So its latents are kept, and the next try decodes those.

Legend: F latent frames of a chunk, C channels, H, W sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from longtake.record import record_from_json
from longtake.runtime.backends.base import State
from longtake.runtime.camera import CameraPosition
from longtake.runtime.story import Segment
from longtake.runtime.video_model import VideoModel
from longtake.training.models.family import Marker
from longtake.training.models.sana_wm.actions import Walk

MOST = 1 << 40  # chunks
KEPT = "kept."  # in front of the chunk's index, in a snapshot


@dataclass(frozen=True)
class Edit:
    """A live change: from chunk `at` on, a new prompt (None keeps it), with or without a scene cut."""

    at: int
    prompt: str | None
    cut: bool


def with_edit(edits: tuple[Edit, ...], new: Edit) -> tuple[Edit, ...]:
    """`edits` and a later one. Changes for one chunk become one, so that their number stays bounded by the chunks."""
    if not edits or edits[-1].at != new.at:
        return (*edits, new)
    last = edits[-1]
    return (*edits[:-1], Edit(new.at, last.prompt if new.prompt is None else new.prompt, last.cut or new.cut))


@dataclass(frozen=True)
class Position:
    """Where a session stands, tensors aside.

    chunk: index of the next chunk. shot: shots begun before it, minus one. prompt: the last chunk's prompt.
    script: what is still to come. edits: live changes not yet taken up. slots: which slots of the state
    hold what. camera: of a model with cameras.
    """

    script: tuple[Segment, ...]
    slots: Marker
    chunk: int = 0
    shot: int = 0
    prompt: str = ""
    edits: tuple[Edit, ...] = ()
    camera: CameraPosition | None = None

    @property
    def left(self) -> int:
        """Chunks the script still holds."""
        return sum(segment.chunks for segment in self.script)

    @property
    def whole(self) -> int:
        """Chunks of the video, those made and those that the script still holds."""
        return self.chunk + self.left

    def upcoming(self, endless: bool) -> Segment | None:
        """The next chunk as a segment of one chunk, live changes included; None at the end of the script."""
        if self.script:
            segment = replace(self.script[0], chunks=1)
        elif endless and self.prompt:
            segment = Segment(self.prompt)
        else:
            return None
        for edit in self.edits:
            if edit.at <= self.chunk:
                segment = Segment(edit.prompt or segment.prompt, 1, segment.cut or edit.cut)
        return replace(segment, cut=segment.cut and self.chunk > 0)

    def after(
        self,
        segment: Segment,
        slots: Marker,
        generated: bool = True,
        scripted: bool = True,
        walk: Walk | None = None,
    ) -> Position:
        """The position once the chunk of `segment` is whole.

        Args:
            generated: not given, as a clip's are: it takes up the live changes.
            scripted: it was the script's; what comes of an endless session after the script's end is not, whatever has
                been appended since it began.
            walk: how the chunk's cameras ended.
        """
        script = self.script
        if script and scripted:
            # A live prompt lasts to the end of the script's segment.
            rest = Segment(segment.prompt, script[0].chunks - 1)
            script = ((rest,) if rest.chunks else ()) + script[1:]
        return Position(
            script=script,
            chunk=self.chunk + 1,
            shot=self.shot + segment.cut,
            prompt=segment.prompt,
            edits=tuple(edit for edit in self.edits if edit.at > self.chunk or not generated),
            slots=slots,
            camera=self.camera.after(walk, self.chunk) if self.camera and walk else self.camera,
        )

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description, read back by `position_from_json`."""
        camera = {} if self.camera is None else {"camera": self.camera.as_json()}
        return {
            **camera,
            "chunk": self.chunk,
            "shot": self.shot,
            "prompt": self.prompt,
            "script": [[s.prompt, s.chunks, s.cut] for s in self.script],
            "edits": [[e.at, e.prompt, e.cut] for e in self.edits],
            "slots": self.slots.as_json(),
        }


def position_from_json(given: Mapping[str, Any], marker: Callable[[Mapping[str, Any]], Marker]) -> Position:
    """Read `Position.as_json` back; `marker` reads the slots of the model's family.

    Raises:
        TypeError, ValueError, KeyError: it is no such description.
    """
    rows = {
        "script": [dict(zip(("prompt", "chunks", "cut"), entry, strict=True)) for entry in given["script"]],
        "edits": [dict(zip(("at", "prompt", "cut"), entry, strict=True)) for entry in given["edits"]],
    }
    told = record_from_json(_Told, {**given, **rows})
    if not 0 <= told.shot <= told.chunk < MOST or any(not 0 < segment.chunks < MOST for segment in told.script):
        raise ValueError(f"chunk {told.chunk}, shot {told.shot}, or a segment of a wrong length")
    return Position(told.script, marker(given["slots"]), told.chunk, told.shot, told.prompt, told.edits, told.camera)


@dataclass(frozen=True)
class _Told:
    """A position as JSON tells it, but for the slots."""

    script: tuple[Segment, ...]
    edits: tuple[Edit, ...]
    chunk: int
    shot: int
    prompt: str
    camera: CameraPosition | None = None


class SessionState:
    """A model's state of one video: one set of tensors, and a second one for the negative prompt under CFG.

    They are allocated once and used in place. Which slots count is told by the marker in `Position`: staging a chunk
    yields the next marker, keeping it is the commit.
    """

    def __init__(self, model: VideoModel, negative: bool) -> None:
        self.positive: State = model.new_state()
        self.negative: State | None = model.new_state() if negative else None

    @property
    def _sides(self) -> dict[str, State]:
        sides = {"positive": self.positive, "negative": self.negative}
        return {side: state for side, state in sides.items() if state}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this process holds, by name, not copied."""
        return {f"{side}.{name}": t for side, state in self._sides.items() for name, t in state.tensors.items()}

    def whole(self) -> dict[str, Tensor]:
        """The whole tensors by name, for snapshots: see State.whole."""
        return {f"{side}.{name}": t for side, state in self._sides.items() for name, t in state.whole().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of `whole`."""
        return {f"{side}.{name}": s for side, state in self._sides.items() for name, s in state.shapes().items()}

    @property
    def bytes(self) -> int:
        """Of `whole`."""
        return sum(state.bytes for state in self._sides.values())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy whole tensors over the state, in place."""
        for side, state in self._sides.items():
            state.load({name: tensors[f"{side}.{name}"] for name in state.shapes()})


@dataclass(frozen=True)
class HandedOver:
    """One chunk: the session's position before and after it, and its latents [1, F, C, H, W]."""

    before: Position
    after: Position
    latents: Tensor


class Undecoded:
    """The chunks in the order they were handed over. `kept`: latents of chunks that are not generated again, by index."""

    def __init__(self) -> None:
        self.chunks: tuple[HandedOver, ...] = ()
        self.kept: dict[int, Tensor] = {}

    @property
    def first_free(self) -> int:
        """The first chunk that live changes can still shape."""
        return max(self.kept, default=-1) + 1

    def add(self, chunk: HandedOver) -> None:
        """To be called before the position is committed."""
        self.chunks = (*self.chunks, chunk)

    def settle(self, decoded: int, position: Position) -> None:
        """Forget the chunks before number `decoded`, and those that were not committed after all."""
        if self.chunks or self.kept:
            waiting = (one for one in self.chunks if decoded < one.after.chunk <= position.chunk)
            self.chunks = tuple(waiting)
            self.kept = {index: latents for index, latents in self.kept.items() if index >= decoded}

    def position_before(self, index: int, now: Position) -> Position:
        """The position before chunk `index`, with what has been asked for since. Calling it again changes nothing."""
        undone = [one for one in self.chunks if index < one.after.chunk <= now.chunk]
        self.kept |= {one.before.chunk: one.latents for one in undone[:-1]}
        for one in reversed(undone):
            now = _before(one, now)
        return now

    def tensors(self) -> dict[str, Tensor]:
        """For a snapshot."""
        return {f"{KEPT}{index}": latents.detach().clone() for index, latents in self.kept.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin anew from a snapshot's tensors."""
        own = {name.removeprefix(KEPT): tensor for name, tensor in tensors.items() if name.startswith(KEPT)}
        self.chunks, self.kept = (), {int(index): tensor.clone() for index, tensor in own.items()}


def _before(chunk: HandedOver, now: Position) -> Position:
    """The position before a chunk, given the one that came of it: scripts only grow at their end, and live changes that
    came later are for later chunks."""
    appended = now.script[len(chunk.after.script) :]
    taken_up = tuple(edit for edit in chunk.before.edits if edit.at <= chunk.before.chunk)
    camera = chunk.before.camera and chunk.before.camera.taken_back(now.camera, chunk.before.chunk)
    edits = (*taken_up, *now.edits)
    return replace(chunk.before, script=(*chunk.before.script, *appended), edits=edits, camera=camera)
