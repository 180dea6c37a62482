"""The held-out stories that models are measured on: scans that no training story shows, fixed by seed.

They are frozen: figures of one day are compared with those of another, so a test holds the digest of all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple, TypeVar

import torch

from longtake.training.data.digit_stories import Shot, Story
from longtake.training.data.digits import random_story, scans_of
from longtake.training.models.text.grammar import BACKGROUNDS, COLOURS, LIGHTS

UPRIGHT = ("rises", "sinks", "drifts left", "drifts right", "stands still", "circles")  # the digit doesn't turn or grow
MIXED_SEED, RETURN_SEED, LONG_SEED, MEMORY_SEED, FILM_SEED = 501, 502, 503, 504, 505
FIRST, LAST = 1, 4  # chunks of a returning subject's two shots: in the last chunk both sinks are held, and differ
DISTANCES = (3, 7, 15, 27, 40)  # chunks from the subject's shot to its return: stories of 8, 12, 20, 32 and 45 chunks
BETWEEN = (1, 2, 4)  # subjects in these chunks
T = TypeVar("T")


class Cell(NamedTuple):
    """One place of the table of returns: how many chunks lie between, and how many subjects."""

    distance: int
    between: int

    @property
    def chunks(self) -> int:
        """Of the whole story."""
        return FIRST + self.distance + LAST


def cells_of(distances: Sequence[int] = DISTANCES, between: Sequence[int] = BETWEEN) -> list[Cell]:
    """All cells that can be: every subject between has a chunk at least."""
    return [Cell(distance, others) for distance in distances for others in between if others <= distance]


def mixed_stories(count: int, chunks: int, seed: int = MIXED_SEED) -> list[Story]:
    """Random stories like those of training, of held-out scans."""
    generator = torch.Generator().manual_seed(seed)
    return [random_story(generator, chunks, "eval") for _ in range(count)]


def returning_stories(count: int, lengths: tuple[int, int, int], seed: int = RETURN_SEED) -> list[Story]:
    """A subject, another digit, the first subject again (same scan and colour, other place): `lengths` chunks each.

    The last shot's prompts leave the colour out.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_returning(number, lengths, generator) for number in range(count)]


def long_stories(count: int, chunks: int, seed: int = LONG_SEED) -> list[Story]:
    """One shot of one digit for `chunks` chunks, so that nothing but time can change it; all digits equally often."""
    generator = torch.Generator().manual_seed(seed)
    return [Story((_shot(number % 10, chunks, generator),)) for number in range(count)]


def memory_stories(cell: Cell, count: int, seed: int = MEMORY_SEED) -> list[Story]:
    """A subject for a chunk, so many others over so many chunks, the first again for four (same scan and colour).

    All digits and colours of a story differ. The last shot's prompts leave the colour out: from a distance of three
    chunks on it lies in no recent chunk, only in the global sink. Cells don't share their draws.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + cell.distance * 101 + cell.between)
    return [_remembered(number, cell, generator) for number in range(count)]


def digest_of(stories: Sequence[Story]) -> str:
    """sha256 of all that the stories are."""
    return hashlib.sha256(json.dumps([asdict(story) for story in stories]).encode()).hexdigest()


def _remembered(number: int, cell: Cell, generator: torch.Generator) -> Story:
    digits = [number % 10]
    while len(digits) <= cell.between:
        digits.append(_pick([digit for digit in range(10) if digit not in digits], generator))
    shots: list[Shot] = []
    for digit, chunks in zip(digits, (FIRST, *_parts(cell.distance, cell.between, generator))):
        taken = {shot.background for shot in shots[-1:]}
        shots.append(_shot(digit, chunks, generator, taken, {shot.colour for shot in shots}))
    first = shots[0]
    again = _shot(first.digit, LAST, generator, {first.background, shots[-1].background})
    return Story((*shots, replace(again, scan=first.scan, colour=first.colour, named=False)))


def _parts(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`total` in `count` random parts of one or more."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: count - 1] + 1).tolist())
    return [end - begin for begin, end in zip((0, *cuts), (*cuts, total))]


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
    """A shot over none of the backgrounds `taken`, in none of `colours`."""
    return Shot(
        digit,
        _pick(scans_of(digit, "eval"), generator),
        _pick([name for name in COLOURS if name not in colours], generator),
        _pick(UPRIGHT, generator),
        _pick([name for name in BACKGROUNDS if name not in taken], generator),
        _pick(LIGHTS, generator),
        chunks,
    )


def _pick(items: Sequence[T], generator: torch.Generator) -> T:
    return items[_below(len(items), generator)]


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
