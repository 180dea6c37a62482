"""What a session carries from chunk to chunk: a position (small, immutable) and layer states (tensors, in place).

A chunk stages its changes and commits them in one assignment when it is whole; until then nothing a retry would read
has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from longtake.runtime.backends.base import Backend, Cache
from longtake.runtime.story import Segment
from longtake.training.models.wan.slots import Plan, SlotTable, slots_from_json


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
    script: what is still to come. edits: live changes not yet taken up. slots: the cache's slot table.
    """

    script: tuple[Segment, ...]
    chunk: int = 0
    shot: int = 0
    prompt: str = ""
    edits: tuple[Edit, ...] = ()
    slots: SlotTable = field(default_factory=SlotTable)

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

    def after(self, segment: Segment, slots: SlotTable, edits: tuple[Edit, ...], scripted: bool = True) -> Position:
        """The position once the chunk of `segment` is whole. `edits` are all that are known by then.

        A chunk that is not `scripted` was given, not generated: it uses up neither the script nor live changes.
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
            edits=tuple(edit for edit in edits if edit.at > self.chunk or not scripted),
            slots=slots,
        )

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description, read back by `position_from_json`."""
        return {
            "chunk": self.chunk,
            "shot": self.shot,
            "prompt": self.prompt,
            "script": [[s.prompt, s.chunks, s.cut] for s in self.script],
            "edits": [[e.at, e.prompt, e.cut] for e in self.edits],
            "slots": self.slots.as_json(),
        }


def position_from_json(given: dict[str, Any]) -> Position:
    """Read `Position.as_json` back."""
    return Position(
        script=tuple(Segment(*entry) for entry in given["script"]),
        chunk=given["chunk"],
        shot=given["shot"],
        prompt=given["prompt"],
        edits=tuple(Edit(*entry) for entry in given["edits"]),
        slots=slots_from_json(given["slots"]),
    )


class KVState:
    """K/V slots of all layers: one cache, and a second one for the negative prompt under CFG."""

    def __init__(self, backend: Backend, negative: bool) -> None:
        self.positive: Cache = backend.new_cache()
        self.negative: Cache | None = backend.new_cache() if negative else None

    def stage(self, marker: SlotTable, cut: bool) -> Plan:
        return marker.plan(cut)

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for side, cache in (("positive", self.positive), ("negative", self.negative or [])):
            for layer, parts in enumerate(cache):
                named |= {f"{side}.{layer}.{i}": tensor for i, tensor in enumerate(parts)}
        return named
