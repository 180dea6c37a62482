"""Which slots a chunk reads and which one it writes.

Recurrent states and tails have two slots that take turns. Keys and values have `window` slots: chunk 0, the sink, keeps
slot 0; later chunks go round the others, of which one is always free for the chunk that is being made. The number of the
others is even, so that one number says both: a state's slot is the slot of the keys modulo two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longtake.errors import LongtakeError
from longtake.training.models.sana_wm.memory import seen_chunks

CURRENT = -1  # table entry: the chunk's own keys and values


@dataclass(frozen=True)
class Turns:
    """window: slots of keys and values. count: chunks that are whole."""

    window: int
    count: int = 0

    def slot_of(self, chunk: int) -> int:
        """Where chunk `chunk` is written; chunk -1 stands for what is there before a video starts."""
        return 0 if chunk == 0 else 1 + (chunk - 1) % (self.window - 1)

    @property
    def visible(self) -> tuple[int, ...]:
        """See `family.Plan`."""
        return (*seen_chunks(self.count, self.window - 1), self.count)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """See `family.Plan`. Before chunk 0 the slot that is read has never been written, and holds zeros."""
        read = self.slot_of(self.count - 1) % 2 if self.count else 1
        table = (*(self.slot_of(chunk) for chunk in self.visible[:-1]), CURRENT)
        return {"table": table, "read_slot": (read,), "write_slot": (self.slot_of(self.count),)}

    @property
    def after(self) -> Turns:
        """See `family.Plan`."""
        return Turns(self.window, self.count + 1)

    def plan(self, cut: bool) -> Turns:
        """See `family.Marker`; raises LongtakeError for a cut, which the model does not have."""
        if cut:
            what, got = "this model has no cuts", f"a cut at chunk {self.count}"
            expected, fix = "one shot", "leave the cut out, or start another video"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
        return self

    def as_json(self) -> dict[str, Any]:
        """See `family.Marker`."""
        return {"window": self.window, "count": self.count}


def turns_from_json(given: Mapping[str, Any]) -> Turns:
    """Read `Turns.as_json` back."""
    return Turns(given["window"], given["count"])
