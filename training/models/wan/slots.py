"""The slot table: which cached blocks a chunk sees, and where its own K/V go. Nothing is ever moved.

A slot holds one block (a chunk's K and V, all layers). The window is `capacity` blocks, the preset's `window_chunks`:
the global sink (block 0 of the video), the shot sink (first block of the current shot), the newest blocks that there is
room for (of four: the previous one) and the current one. Rolling, pinning and rebinding change this table only. The rules are LongLive 2.0's:

* a block is dropped before the new block is generated, so its slot is free for the new block's K/V: the victim is dead
  for every pass of the chunk, and for any retry of it;
* the dropped block is the oldest one that is not protected. Block 0 always is; the shot sink is once everything
  between block 0 and it has been dropped;
* a cut binds the shot sink to the cut's own block, after that block was generated. The old shot sink loses its
  protection there and then.

These rules stand here only: sessions, rollouts and the histories of training all ask this table. An experiment may
leave sinks out of it (`Sinks`); the window stays as many blocks, so it then sees more of the near past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longtake.record import record_from_json

MOST_SLOTS = 4096
CURRENT = -1  # table entry: the current block's fresh K/V


@dataclass(frozen=True)
class Sinks:
    """Which blocks are protected: block 0 of the video (globally), and the first block of the current shot."""

    globally: bool = True
    shot: bool = True


BOTH = Sinks()


@dataclass(frozen=True)
class SlotTable:
    """Cached blocks, oldest first, and their slots; `shot` is the shot sink's block. Immutable: a plan carries the next.

    blocks: indices of the cached blocks. slots: the slot of each. count: blocks generated so far.
    """

    capacity: int
    blocks: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    shot: int | None = None
    count: int = 0

    def _protected(self, sinks: Sinks) -> int:
        """How many leading blocks may not be dropped."""
        first = int(sinks.globally)
        return first + (sinks.shot and self.blocks[first : first + 1] == (self.shot,))

    def plan(self, cut: bool, sinks: Sinks = BOTH) -> Plan:
        """What the next block reads and writes; `cut` says it is the first of a new shot (ignored for block 0)."""
        blocks, slots = list(self.blocks), list(self.slots)
        if len(blocks) == self.capacity:
            victim = self._protected(sinks)
            del blocks[victim]
            write_slot = slots.pop(victim)
        else:
            write_slot = len(blocks)
        after = SlotTable(
            self.capacity,
            (*blocks, self.count),
            (*slots, write_slot),
            self.count if cut and self.count else self.shot,
            self.count + 1,
        )
        return Plan((*slots, CURRENT), write_slot, (*blocks, self.count), after)

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description, read back by `slots_from_json`."""
        return {
            "capacity": self.capacity,
            "blocks": list(self.blocks),
            "slots": list(self.slots),
            "shot": self.shot,
            "count": self.count,
        }


@dataclass(frozen=True)
class Plan:
    """One block's use of the cache.

    table: slots to read, CURRENT for the block itself. write_slot: where its clean pass writes, read by no pass of it.
    visible: the block indices that `table` stands for. after: the table once the block is committed.
    """

    table: tuple[int, ...]
    write_slot: int
    visible: tuple[int, ...]
    after: SlotTable

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """See `family.Plan`."""
        return {"table": self.table, "write_slot": (self.write_slot,)}


def slots_from_json(given: Mapping[str, Any]) -> SlotTable:
    """Read `SlotTable.as_json` back. Raises TypeError or ValueError for what is no slot table."""
    table = record_from_json(SlotTable, dict(given))
    blocks, used = list(table.blocks), len(table.blocks)
    if not (
        used <= table.capacity <= MOST_SLOTS
        and sorted(table.slots) == list(range(used))
        and blocks == sorted(set(blocks))
        and all(0 <= block < table.count for block in blocks)
        and (table.shot is None or 0 <= table.shot < max(1, table.count))
    ):
        raise ValueError(f"slots that are none: {dict(given)!s:.200}")
    return table


def plans_of(cuts: Sequence[bool], capacity: int, sinks: Sinks = BOTH) -> list[Plan]:
    """Each block's plan, given which blocks start a shot."""
    # Block 0 is the first shot's sink, too, which makes a difference only where the global sink is left out.
    table, plans = SlotTable(capacity, shot=0), []
    for cut in cuts:
        plans.append(table.plan(cut, sinks))
        table = plans[-1].after
    return plans


def visible_blocks(cuts: Sequence[bool], capacity: int) -> list[tuple[int, ...]]:
    """For each block, the blocks it attends to (itself last), given which blocks start a shot."""
    return [plan.visible for plan in plans_of(cuts, capacity)]
