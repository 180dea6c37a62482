"""What time alone does to one long shot: fidelity, image statistics, and how much of the first five chunks' fidelity is left.

A frozen picture does not drift. So a film has a figure only if its motion, contrast and detail at the end are within
STEADY of what they were at the beginning.

Legend: B films, N chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longtake.training.data.digit_stories import Story
from longtake.training.experiment.evaluate import EVERY, Eyes, Result, rounded, seen_digits

NAMES = ("fidelity", "brightness", "contrast", "saturation", "detail", "motion")
GUARDS = ("motion", "contrast", "detail")
STEADY = 0.2
EDGE = 5  # chunks at the beginning and at the end
LEAST_MOTION = 1e-3  # of pixels in 0..1: what less moves is a picture that stands, in which noise would decide


def statistics(frames_B3THW: Tensor, wanted: Tensor, eyes: Eyes) -> Tensor:
    """NAMES of one chunk of every film, [6, B].

    brightness: mean of the pixels, 0..1. contrast: their standard deviation over a frame. saturation: mean of the
    largest less the smallest colour. detail: root mean square difference of neighbouring pixels (a soft edge has as large
    a sum of differences as a sharp one, but not of their squares). motion: mean difference of neighbouring frames.
    """
    x = frames_B3THW[:, :, ::EVERY] / 2 + 0.5
    share = (seen_digits(eyes, frames_B3THW)[0] == wanted[:, None]).float().mean(1)
    detail = sum(x.diff(dim=axis).square().flatten(1).mean(1) for axis in (-1, -2)).sqrt()  # type: ignore[union-attr]
    saturation = (x.amax(1) - x.amin(1)).flatten(1).mean(1)
    motion = frames_B3THW.diff(dim=2).abs().flatten(1).mean(1) / 2
    return torch.stack((share, x.flatten(1).mean(1), x.mean(1).flatten(2).std(-1).mean(1), saturation, detail, motion))


def edges(table_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the first and the last chunks, [B] each."""
    edge = max(1, min(EDGE, len(table_NB) // 3))
    return table_NB[:edge].mean(0), table_NB[-edge:].mean(0)


def steady(tables: dict[str, Tensor]) -> Tensor:
    """Films that end as lively as they began, bool [B]; tables: name -> [N, B]."""
    kept = torch.ones(next(iter(tables.values())).shape[1], dtype=torch.bool)
    for name in GUARDS:
        begin, end = edges(tables[name])
        least = LEAST_MOTION if name == "motion" else 1e-6
        kept &= ((end - begin).abs() <= STEADY * begin.clamp(min=least)).cpu()
    return kept


def drift(chunks: Iterable[Tensor], stories: Sequence[Story], eyes: Eyes) -> Result:
    """Statistics of each chunk, their means over the first and last five, and the fidelity that is left of the first five's.

    left: fidelity of the last five chunks over that of the first five, of the films with a figure; absent if there is none.
    steady_films: the share of films with one.
    """
    wanted = torch.tensor([story.shots[0].digit for story in stories], device=eyes.device)
    found = torch.stack([statistics(frames, wanted, eyes) for frames in chunks], 1).cpu()  # [6, N, B]
    tables = dict(zip(NAMES, found))
    kept = steady(tables)
    result: Result = {"steady_films": float(kept.float().mean())}
    for name, table in tables.items():
        begin, end = edges(table)
        result[f"{name}_by_chunk"] = table.mean(1).tolist()
        result[f"{name}_start"], result[f"{name}_end"] = float(begin.mean()), float(end.mean())
    begin, end = edges(tables["fidelity"])
    result["fidelity_start_by_story"], result["fidelity_end_by_story"] = rounded(begin), rounded(end)
    result["steady_by_story"] = kept.float().tolist()
    if kept.any() and begin[kept].sum() > 0:
        result["left"] = float(end[kept].sum() / begin[kept].sum())
    return result
