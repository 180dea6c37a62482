"""The slot table with either sink left out, for the experiment's four conditions; with both it is the runtime's."""

from __future__ import annotations

from collections.abc import Sequence

from longtake.training.models.wan.slots import Sinks, plans_of

CONDITIONS = {
    "both": Sinks(),
    "global": Sinks(shot=False),
    "shot": Sinks(globally=False),
    "none": Sinks(globally=False, shot=False),
}
SINKS = tuple(CONDITIONS)


def slot_plans(cuts: Sequence[bool], sinks: str = "both", capacity: int = 4) -> list[tuple[tuple[int, ...], int]]:
    """For each block of a story: the slots it reads (without its own) and the slot it is written to.

    Args:
        sinks: "both", "global" (block 0 of the video), "shot" (first block of the current shot) or "none".
    """
    return [(plan.table[:-1], plan.write_slot) for plan in plans_of(cuts, capacity, CONDITIONS[sinks])]
