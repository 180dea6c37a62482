"""Whether a subject that returns is still itself: colour and shape, by distance and by the number of subjects between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from longtake.training.data.digit_stories import Story
from longtake.training.data.held_out_stories import Cell, cells_of, memory_stories
from longtake.training.experiment.evaluate import Eyes, Result, identity, rounded
from longtake.training.experiment.settings import Settings

# Of returns: condition, format of the cache, sinks. The last two tell what 4 bits do to memory.
MEMORY = {
    "both": ("nvfp4", "nvfp4", "both"),
    "global": ("nvfp4", "nvfp4", "global"),
    "shot": ("nvfp4", "nvfp4", "shot"),
    "none": ("nvfp4", "nvfp4", "none"),
    "bf16cache": ("nvfp4", "bf16", "both"),
    "bf16": ("bf16", "bf16", "both"),
}
METRICS = ("colour", "colour_first", "colour_last", "iou")
BY = ("colour", "iou")  # shown by distance and by subjects between
Make = Callable[[Sequence[Story]], Iterable[Tensor]]  # stories of one length -> the frames of each chunk


def at_distance(metric: str, distance: int) -> str:
    """The key of a metric of the returns from so many chunks away."""
    return f"{metric}_at_{distance}"


def past_subjects(metric: str, between: int) -> str:
    """The key of a metric of the returns past so many subjects."""
    return f"{metric}_past_{between}"


def metrics_of(settings: Settings) -> tuple[str, ...]:
    """All that `memory` finds of one number."""
    by_distance = (at_distance(metric, distance) for metric in BY for distance in settings.memory_distances)
    by_between = (past_subjects(metric, between) for metric in BY for between in settings.memory_between)
    return (*METRICS, *by_distance, *by_between)


def memory(make: Make, settings: Settings, eyes: Eyes) -> Result:
    """`identity` of the frozen stories of all cells, as a mean over all and over those of each distance and number.

    The means by number of subjects are of the distances that have every number, so that they differ by nothing else.
    """
    cells = cells_of(settings.memory_distances, settings.memory_between)
    rows: dict[str, dict[Cell, Tensor]] = {metric: {} for metric in METRICS}
    for distance in settings.memory_distances:
        own = [cell for cell in cells if cell.distance == distance]
        stories = [story for cell in own for story in memory_stories(cell, settings.memory_stories)]
        found = identity(make(stories), stories, eyes)
        for metric, table in rows.items():
            table |= dict(zip(own, torch.tensor(found[f"{metric}_by_story"]).split(settings.memory_stories)))
    result: Result = {"stories": float(len(cells) * settings.memory_stories)}
    for metric, table in rows.items():
        result[metric] = mean_of(table.values())
        result[f"{metric}_by_story"] = rounded(torch.cat(list(table.values())))
        for distance in settings.memory_distances:
            result[at_distance(metric, distance)] = mean_of(v for c, v in table.items() if c.distance == distance)
        full = {c for c in table if c.distance >= max(settings.memory_between)}
        for between in settings.memory_between:
            if parts := [table[cell] for cell in full if cell.between == between]:
                result[past_subjects(metric, between)] = mean_of(parts)
    return result


def mean_of(parts: Iterable[Tensor]) -> float:
    """Of all values together."""
    return float(torch.cat(list(parts)).mean())
