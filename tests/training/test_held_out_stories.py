"""The stories that models are measured on: frozen, and of the shape that the questions need."""

from __future__ import annotations

import pytest

from longtake.training.data.digit_stories import Story
from longtake.training.data.digits import chunk_prompts, scans_of
from longtake.training.data.held_out_stories import (
    FILM_SEED,
    FIRST,
    LAST,
    Cell,
    cells_of,
    digest_of,
    long_stories,
    memory_stories,
    mixed_stories,
    returning_stories,
)
from longtake.training.models.presets import TINY
from longtake.training.models.wan.slots import plans_of

# A change here makes every figure measured so far worthless: it needs new figures, not a new digest.
FROZEN = {
    "mixed": "f1f714fa2a56045fcfd8e9475d26284ac7debcf47dfb0238cd5783248e8a4fd6",
    "returning": "27bb984bcc5c694216130c9a225ef6348e6424df9da5001837e8f9072035ebc3",
    "minute": "ddaccd6ecf2b8601bc248c8108c1581ffc441ba65c416d95ed6435c1bcc9b830",
    "film": "bbcfba2f7875df7b4f2704eea6866b374cc04adc546b97b63f65963d027989d2",
    "memory": "97aa9402cfa94e0c30b7591fd3b1021ddebf528ec71d430911309d1e03b96147",
}


def stories_of(name: str) -> list[Story]:
    """As many as are measured, and more."""
    return {
        "mixed": lambda: mixed_stories(384, 5),
        "returning": lambda: returning_stories(160, (2, 4, 3)),
        "minute": lambda: long_stories(40, 45),
        "film": lambda: long_stories(16, 225, FILM_SEED),
        "memory": lambda: [story for cell in cells_of() for story in memory_stories(cell, 32)],
    }[name]()


@pytest.mark.parametrize("name", list(FROZEN))
def test_held_out_stories_are_those_of_all_figures_so_far(name: str) -> None:
    assert digest_of(stories_of(name)) == FROZEN[name]


def test_fewer_stories_are_the_first_of_more() -> None:
    for cell in cells_of():
        assert memory_stories(cell, 3) == memory_stories(cell, 5)[:3]


def test_returns_are_of_8_to_45_chunks_and_as_far_as_they_say() -> None:
    assert {cell.chunks for cell in cells_of()} == {8, 12, 20, 32, 45}
    assert Cell(3, 4) not in cells_of() and Cell(3, 2) in cells_of()
    for cell in cells_of():
        for story in memory_stories(cell, 10):
            first, *others, last = story.shots
            assert story.chunks == cell.chunks and (first.chunks, last.chunks) == (FIRST, LAST)
            assert len(others) == cell.between and sum(shot.chunks for shot in others) == cell.distance
            assert (first.digit, first.scan, first.colour) == (last.digit, last.scan, last.colour)
            assert first.named and not last.named and all(shot.named for shot in others)
            for values in ([s.digit for s in story.shots[:-1]], [s.colour for s in story.shots[:-1]]):
                assert len(set(values)) == len(values)
            assert all(a.background != b.background for a, b in zip(story.shots, story.shots[1:]))
            assert all(shot.scan in scans_of(shot.digit, "eval") for shot in story.shots)


def test_only_the_global_sink_tells_and_both_sinks_are_held_at_the_end() -> None:
    for cell in cells_of():
        for story in memory_stories(cell, 4):
            _, cuts = chunk_prompts(story)
            seen = [plan.visible for plan in plans_of(cuts, TINY.window_chunks)]
            start = cell.chunks - LAST
            assert all(block == 0 or block >= FIRST for block in seen[start])
            assert [block for block in seen[start] if block < FIRST] == [0]
            assert seen[-1] == (0, start, cell.chunks - 2, cell.chunks - 1)
