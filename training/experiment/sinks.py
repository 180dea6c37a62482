"""The slot table with either sink left out, for the experiment's four conditions; with both it is the runtime's."""

from __future__ import annotations

from collections.abc import Sequence

SINKS = ("both", "global", "shot", "none")


def slot_plans(cuts: Sequence[bool], sinks: str = "both", capacity: int = 4) -> list[tuple[tuple[int, ...], int]]:
    """For each block of a story: the slots it reads (without its own) and the slot it is written to.

    The window is `capacity` blocks whatever is protected in it, so a condition without sinks sees more of the near past.
    A shot's sink is its first block, the first shot's included; it becomes protected once it is the oldest block but
    for the protected global sink, and is bound after it was generated, all as in `runtime.slots`.

    Args:
        sinks: "both", "global" (block 0 of the video), "shot" (first block of the current shot) or "none".
    """
    use_global, use_shot = sinks in ("both", "global"), sinks in ("both", "shot")
    blocks: list[int] = []
    slots: list[int] = []
    shot, plans = 0, []
    for block, cut in enumerate(cuts):
        if len(blocks) == capacity:
            victim = 1 if use_global else 0
            victim += use_shot and blocks[victim : victim + 1] == [shot]
            del blocks[victim]
            write = slots.pop(victim)
        else:
            write = len(blocks)
        plans.append((tuple(slots), write))
        blocks.append(block)
        slots.append(write)
        shot = block if cut and block else shot
    return plans
