"""Returns by distance and subjects between, drift with its guard, and what the report makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from longtake.training.data.base import chunk_starts
from longtake.training.data.digit_stories import Shot, Story
from longtake.training.data.digits import Digits, scans_of
from longtake.training.experiment.classifier import DigitClassifier
from longtake.training.experiment.drift import drift, steady
from longtake.training.experiment.evaluate import Eyes
from longtake.training.experiment.memory import MEMORY, memory, metrics_of
from longtake.training.experiment.report import markdown
from longtake.training.experiment.settings import Settings
from longtake.training.experiment.summary import claims, summary
from longtake.training.models.presets import TINY
from longtake.training.models.text.grammar import COLOURS

CPU = torch.device("cpu")
FEW = replace(Settings(), memory_stories=1, memory_distances=(1, 2), memory_between=(1, 2))


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    torch.manual_seed(0)
    return Eyes(DigitClassifier(8).eval(), nn.Identity(), CPU)


@cache
def video_of(story: Story) -> Tensor:
    """Rendered once."""
    return Digits(TINY, "eval").render([story], CPU)


def frames_of(stories: Sequence[Story]) -> Iterable[Tensor]:
    """The data set's own frames, chunk by chunk."""
    video = torch.cat([video_of(story) for story in stories])
    starts = [*chunk_starts(TINY, stories[0].chunks), video.shape[2]]
    return [video[:, :, begin:end] for begin, end in zip(starts, starts[1:])]


def forgotten(stories: Sequence[Story]) -> Iterable[Tensor]:
    """The same with the returning subject in another colour."""
    changed = []
    for story in stories:
        last = story.shots[-1]
        other = COLOURS[(COLOURS.index(last.colour) + 1) % len(COLOURS)]
        changed.append(Story((*story.shots[:-1], replace(last, colour=other))))
    return frames_of(changed)


def test_who_remembers_is_told_from_who_forgets_by_distance_and_subjects(eyes: Eyes) -> None:
    kept, lost = memory(frames_of, FEW, eyes), memory(forgotten, FEW, eyes)
    assert set(metrics_of(FEW)) <= set(kept) and kept["stories"] == 3 == len(kept["colour_by_story"])  # type: ignore[arg-type]
    for key in (
        "colour",
        "colour_at_1",
        "colour_at_2",
        "colour_past_1",
        "colour_past_2",
        "colour_first",
        "colour_last",
    ):
        assert kept[key] > 0.9 and lost[key] < 0.1, key  # type: ignore[operator]
    assert kept["iou"] > 0.75 and lost["iou"] > 0.75  # type: ignore[operator]


def test_a_mean_by_subjects_is_of_the_distances_that_have_all(eyes: Eyes) -> None:
    half = memory(lambda stories: (frames_of if stories[0].chunks == 6 else forgotten)(stories), FEW, eyes)
    assert half["colour_at_1"] > 0.9 and half["colour_past_1"] < 0.1  # type: ignore[operator]


def film(motion: str = "rises", chunks: int = 6) -> Story:
    return Story((Shot(3, scans_of(3, "eval")[0], "yellow", motion, "sea", "light from above", chunks),))


def test_a_film_that_goes_on_as_it_began_has_a_drift_figure(eyes: Eyes) -> None:
    found = drift(frames_of([film(chunks=3), film("stands still", 3)]), [film(chunks=3)] * 2, eyes)
    assert found["steady_films"] == 1.0 and found["motion_start"] == pytest.approx(found["motion_end"], rel=0.2)  # type: ignore[arg-type]


@pytest.mark.parametrize("guard", ["motion", "contrast", "detail"])
def test_a_film_that_freezes_fades_or_blurs_has_none(eyes: Eyes, guard: str) -> None:
    first = [film("rises", 3)] * 2
    chunks = list(frames_of(first))
    for place, frames in enumerate(chunks[2:], 2):
        spoilt = frames[:1]
        if guard == "motion":
            spoilt = spoilt[:, :, :1].expand(-1, -1, spoilt.shape[2], -1, -1)
        if guard == "contrast":
            spoilt = spoilt * 0.6
        if guard == "detail":
            spoilt = nn.functional.avg_pool3d(spoilt, (1, 9, 9), 1, (0, 4, 4), count_include_pad=False)
        chunks[place] = torch.cat((spoilt, frames[1:]))
    found = drift(chunks, first, eyes)
    assert found["steady_by_story"] == [0.0, 1.0] and found["steady_films"] == 0.5
    only = drift([frames[:1] for frames in chunks], first[:1], eyes)
    assert "left" not in only


def test_a_fifth_is_still_steady() -> None:
    plain = {name: torch.tensor([[1.0], [1.0], [1.0]]) for name in ("motion", "contrast", "detail")}
    for change, kept in ((0.19, True), (-0.19, True), (0.21, False), (-0.21, False)):
        changed = {**plain, "detail": torch.tensor([[1.0], [1.0], [1.0 + change]])}
        assert steady(changed).tolist() == [kept], change


def returns(colour: float) -> dict[str, float | list[float]]:
    """A result of `memory` with one colour everywhere."""
    return {
        **dict.fromkeys(metrics_of(Settings()), colour),
        "colour_by_story": [colour] * 4,
        "iou_by_story": [colour] * 4,
    }


def test_tables_and_claims_of_returns() -> None:
    shares = {"both": 0.8, "global": 0.75, "shot": 0.2, "none": 0.13, "bf16cache": 0.84, "bf16": 0.85}
    assert set(shares) == set(MEMORY)
    results = {
        f"memory-{name}-{seed}": returns(share + seed / 100) for name, share in shares.items() for seed in (0, 1)
    }
    results["student-4"] = {"memory": returns(0.7), "drift_minute": {"left": 0.9, "steady_films": 1.0}}  # type: ignore[dict-item]
    settings = Settings()
    said, found = claims(results, settings), summary(results, settings)
    as_well = "over all distances, both sinks keep the colour as well as the better one alone"
    assert said[as_well]["holds"] and said[as_well]["difference"] == pytest.approx(0.05)
    assert said["the FP4 cache keeps the colour within 5 points of the bf16 cache"]["holds"]
    assert said["over all distances, both sinks keep a subject's colour better than none"]["holds"]
    text = markdown(results, settings, found, said, "")
    assert "| … its colour, by distance" not in text and "### … its colour, by distance" in text
    assert "| both sinks, bf16 cache | 0.8450 ± 0.0071 |" in text and "40 chunks (53 s)" in text
    assert "| student-4 | 0.7000 ± 0.0000 |" in text and "| student-4 | 0.9000 ± 0.0000 | 1.0000 ± 0.0000 |" in text
    worse = {**results, **{f"memory-both-{seed}": returns(0.7 + seed / 100) for seed in (0, 1)}}
    assert not claims(worse, settings)[as_well]["holds"]
    assert not claims(worse, settings)["the FP4 cache keeps the colour within 5 points of the bf16 cache"]["holds"]
