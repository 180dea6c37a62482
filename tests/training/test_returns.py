"""Training stories of returns: how far, how often, who is between, and what is refused before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.errors import LongtakeError
from longtake.training.data.digit_stories import Story
from longtake.training.data.digits import returning_story, scans_of
from longtake.training.data.named import dataset_from_name
from longtake.training.data.returns import USUAL, distance_span, distance_text, distant_story
from longtake.training.distill.options import DistillOptions
from longtake.training.models.presets import TINY
from longtake.training.stages.options import StageOptions


def drawn(chunks: int, distance: tuple[int, int], count: int = 150) -> list[Story]:
    """Stories that are no usual ones."""
    generator, found = torch.Generator().manual_seed(7), []
    for _ in range(count):
        place = generator.get_state()
        usual = float(torch.rand((), generator=generator)) < USUAL
        generator.set_state(place)
        story = distant_story(generator, chunks, distance=distance)
        found += [] if usual else [story]
    assert 0.7 < len(found) / count < 0.9
    return found


def gaps_of(story: Story) -> list[tuple[int, int]]:
    """Chunks and subjects between the first subject's shots."""
    found, chunks, others = [], 0, 0
    for shot in story.shots[1:]:
        if shot.digit != story.shots[0].digit:
            chunks, others = chunks + shot.chunks, others + 1
        else:
            found.append((chunks, others))
            chunks = others = 0
    return found


@pytest.mark.parametrize(("chunks", "distance"), [(8, (3, 3)), (20, (3, 12)), (45, (3, 40))])
def test_the_first_subject_returns_from_where_it_is_told(chunks: int, distance: tuple[int, int]) -> None:
    stories = drawn(chunks, distance)
    gaps = [gap for story in stories for gap in gaps_of(story)]
    assert all(story.chunks == chunks for story in stories)
    assert {gap for gap, _ in gaps} <= set(range(distance[0], distance[1] + 1))
    assert {others for _, others in gaps} == {1, 2, 3, 4} - ({4} if distance[1] == 3 else set())
    assert min(gap for gap, _ in gaps) == distance[0] and max(gap for gap, _ in gaps) >= 0.9 * min(distance[1], chunks)
    if chunks == 45:  # uniform in the logarithm: the first chunks of a long story have returns, too
        near = sum(gap < 11 for gap, _ in gaps) / len(gaps)
        assert 0.45 < near < 0.9


def test_only_the_returning_subject_is_not_named() -> None:
    unnamed = 0
    for story in drawn(30, (3, 12)):
        first, *rest = story.shots
        for shot in rest:
            same = shot.digit == first.digit
            assert (shot.colour, shot.scan) == (first.colour, first.scan) if same else shot.colour != first.colour
            assert shot.named or same
            unnamed += not shot.named
        assert all(a.background != b.background for a, b in zip(story.shots, rest))
        assert all(shot.scan in scans_of(shot.digit, "train") for shot in story.shots)
    assert unnamed > 100


def test_the_data_set_without_a_distance_is_what_it_was() -> None:
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    data = dataset_from_name("returning-digits", TINY)
    assert [data.draw(generators[0], 8, "train") for _ in range(5)] == [  # type: ignore[attr-defined]
        returning_story(generators[1], 8, "train") for _ in range(5)
    ]
    far = dataset_from_name("returning-digits", TINY, return_distance=(4, 6))
    assert far.draw(torch.Generator().manual_seed(3), 20, "eval").chunks == 20  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["0", "4..2", "x", "3..", "-1..4", ""])
def test_a_distance_that_is_none_is_refused(text: str) -> None:
    if text == "3..":
        assert distance_span(text) == (3, 3)
        return
    with pytest.raises(LongtakeError, match="bad --return-distance") as error:
        distance_span(text)
    assert "N or N..M" in str(error.value)


def test_a_distance_is_written_as_it_is_read() -> None:
    assert distance_span(distance_text((3, 40))) == (3, 40) and distance_span("8") == (8, 8)


def test_too_short_stories_and_other_data_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="too short for a subject to return") as error:
        StageOptions(data="returning-digits", chunks=(4, 8), return_distance=(7, 40))
    assert "--chunks of at most 8 with --return-distance 7..40" in str(error.value) and "9 chunks or more" in str(
        error.value
    )
    StageOptions(data="returning-digits", chunks=(4, 9), return_distance=(7, 40))
    for kind in (StageOptions, DistillOptions):
        more = {"teacher": tmp_path} if kind is DistillOptions else {}
        with pytest.raises(LongtakeError, match="only one data set has a return distance"):
            kind(data="digits", chunks=(20,), return_distance=(3, 4), **more)
