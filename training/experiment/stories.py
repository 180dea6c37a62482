"""The held-out stories of each question: scans that no training story shows, fixed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from longtake.training.data.digit_stories import Shot, Story
from longtake.training.data.digits import chunk_prompts, random_story, scans_of
from longtake.training.experiment.batched import Script
from longtake.training.models.text.grammar import BACKGROUNDS, COLOURS, LIGHTS

UPRIGHT = ("rises", "sinks", "drifts left", "drifts right", "stands still", "circles")  # the digit doesn't turn or grow


def scripts_of(stories: Sequence[Story], seed: int, first: int = 0) -> list[Script]:
    """What is generated of each story: its prompts and cuts, and a noise of its own. The first has number `first`."""
    made = []
    for number, story in enumerate(stories, first):
        prompts, cuts = chunk_prompts(story)
        made.append(Script(tuple(prompts), tuple(cuts), seed * 100_003 + number))
    return made


def shots_by_chunk(story: Story) -> list[Shot]:
    """The shot (or part of one) that each chunk belongs to."""
    return [shot for shot in story.shots for _ in range(shot.chunks)]


def mixed_stories(count: int, chunks: int, seed: int) -> list[Story]:
    """Random stories like those of training, of held-out scans."""
    generator = torch.Generator().manual_seed(seed)
    return [random_story(generator, chunks, "eval") for _ in range(count)]


def returning_stories(count: int, lengths: tuple[int, int, int], seed: int) -> list[Story]:
    """A subject, another digit, the first subject again (same scan and colour, other place): `lengths` chunks each.

    The last shot's prompts leave the colour out.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_returning(number, lengths, generator) for number in range(count)]


def long_stories(count: int, chunks: int, seed: int) -> list[Story]:
    """One shot of one digit for `chunks` chunks, so that nothing but time can change it; all digits equally often."""
    generator = torch.Generator().manual_seed(seed)
    return [Story((_shot(number % 10, chunks, generator),)) for number in range(count)]


def _returning(number: int, lengths: tuple[int, int, int], generator: torch.Generator) -> Story:
    first = number % 10
    other = (first + 1 + _below(9, generator)) % 10
    begin = _shot(first, lengths[0], generator)
    middle = _shot(other, lengths[1], generator, {begin.background}, {begin.colour})
    end = _shot(first, lengths[2], generator, {begin.background, middle.background})
    return Story((begin, middle, replace(end, scan=begin.scan, colour=begin.colour, named=False)))


def _shot(
    digit: int,
    chunks: int,
    generator: torch.Generator,
    taken: set[str] = frozenset(),  # type: ignore[assignment]
    colours: set[str] = frozenset(),  # type: ignore[assignment]
) -> Shot:
    def pick(items: Sequence, without: set[str] = frozenset()):  # type: ignore[no-untyped-def, assignment, type-arg]  # noqa: ANN202
        kept = [item for item in items if item not in without]
        return kept[_below(len(kept), generator)]

    return Shot(
        digit,
        pick(scans_of(digit, "eval")),
        pick(COLOURS, colours),
        pick(UPRIGHT),
        pick(BACKGROUNDS, taken),
        pick(LIGHTS),
        chunks,
    )


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
