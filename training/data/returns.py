"""Training stories in which the first subject returns again and again, each time after others in turn, unnamed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from longtake.errors import LongtakeError
from longtake.training.data.digit_stories import Shot, Story
from longtake.training.data.digits import LEFT_OUT, Draw, random_shot, returning_story, scans_of
from longtake.training.models.text.grammar import COLOURS

RETURNING = "returning-digits"  # the data set that has a return distance
OTHERS = 4  # subjects between, at most
USUAL = 0.2  # how often the story is one of `returning_story`


def distance_span(text: str) -> tuple[int, ...]:
    """ "3..40" or "8" to the shortest and the longest distance of a return, in chunks."""
    try:
        first, _, last = text.partition("..")
        span = (int(first), int(last or first))
    except ValueError:
        span = (0, 0)
    if not 1 <= span[0] <= span[1]:
        what, got = "bad --return-distance", repr(text)
        expected, fix = "N or N..M with 1 <= N <= M", "--return-distance 3..40"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return span


def distance_text(span: tuple[int, ...]) -> str:
    """What `distance_span` reads."""
    return f"{span[0]}..{span[-1]}"


def require_room(data: str, chunks: tuple[int, ...], distance: tuple[int, ...] | None) -> None:
    """Raise LongtakeError unless stories of `data` have returns, and the longest has room for the nearest one."""
    if distance is None:
        return
    if data != RETURNING:
        what, got = "only one data set has a return distance", f"--data {data}"
        expected, fix = RETURNING, f"--data {RETURNING}, or leave --return-distance out"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    if max(chunks) < distance[0] + 2:
        raise LongtakeError(
            "the stories are too short for a subject to return from so far",
            got=f"--chunks of at most {max(chunks)} with --return-distance {distance_text(distance)}",
            expected=f"{distance[0] + 2} chunks or more: its shot, those between, its return",
            fix=f"--chunks {distance[0] + 2}, or --return-distance {max(1, max(chunks) - 2)}",
        )


def distant_story(
    generator: torch.Generator,
    chunks: int,
    split: str = "train",
    changes: bool = True,
    *,
    distance: tuple[int, ...] = (3, 40),
) -> Story:
    """A story whose first subject returns as often as there is room, each time after a distance drawn from the span.

    Distances are uniform in their logarithm, so that the beginning of a long story has returns, too: steps on shorter
    stories take that. One to four others are between, of other digits and colours than the first; their prompts name the
    colour, the returning one's mostly don't. One story in five is as `returning_story` draws it.
    """
    draw = Draw(generator)
    if draw.unit() < USUAL:
        return returning_story(generator, chunks, split, changes)
    subject = (digit := draw.pick(range(10)), draw.pick(scans_of(digit, split)), draw.pick(COLOURS))
    shots = [random_shot(draw, *subject, min(chunks, draw.pick((1, 1, 2, 3))), None)]
    left = chunks - shots[0].chunks
    while left:
        between = min(left, _distance(draw, distance[0], distance[-1]))
        shots += _others(draw, subject, between, split, shots[-1])
        left -= between
        if left:
            again = random_shot(draw, *subject, min(left, draw.pick((1, 2, 3, 4, 5))), shots[-1])
            shots.append(replace(again, named=draw.unit() >= LEFT_OUT))
            left -= again.chunks
    return Story(tuple(shots))


def _distance(draw: Draw, nearest: int, farthest: int) -> int:
    """Uniform in the logarithm, both ends included."""
    return min(farthest, int(math.exp(math.log(nearest) + draw.unit() * math.log((farthest + 1) / nearest))))


def _others(draw: Draw, subject: tuple[int, int, str], chunks: int, split: str, before: Shot) -> list[Shot]:
    """A shot each of one to four other subjects, `chunks` chunks in all."""
    shots: list[Shot] = []
    count, digits = min(chunks, draw.pick(range(1, OTHERS + 1))), {subject[0]}
    for number in range(count):
        digit = draw.pick([other for other in range(10) if other not in digits])
        digits.add(digit)
        colour = draw.pick([other for other in COLOURS if other != subject[2]])
        room = chunks - sum(shot.chunks for shot in shots) - (count - 1 - number)
        length = room if number == count - 1 else draw.pick(range(1, room + 1))
        shots.append(random_shot(draw, digit, draw.pick(scans_of(digit, split)), colour, length, (before, *shots)[-1]))
    return shots
