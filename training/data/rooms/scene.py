"""A room: textured walls, framed pictures, solid boxes; drawn from a generator, and told in a sentence.

Axes are OpenCV's, as a camera at rest has them: x right, y down, z forward. The floor is at y = 0. Lengths are metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.training.data import digits
from longtake.training.data.rooms.pictures import COLOURS, PATTERNS, photograph, photographs_of, texture

EYE = 1.5  # metres above the floor
MARGIN = 0.5  # that cameras keep from walls and boxes
SIDES = ("left", "right", "far", "near")


@dataclass(frozen=True)
class Box:
    """A solid box from low to high, with one texture for all faces."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    texture: Tensor
    words: str


@dataclass(frozen=True)
class Picture:
    """A framed photograph on a wall: its middle along the wall and above the floor, and half its size."""

    side: str
    along: float
    up: float
    half: float
    texture: Tensor
    word: str


@dataclass(frozen=True)
class Room:
    """width, depth, height: x from -width/2 to width/2, z from -depth/2 to depth/2, y from -height to 0.

    walls: of SIDES, then floor and ceiling.
    """

    width: float
    depth: float
    height: float
    walls: tuple[Tensor, ...]
    words: tuple[str, ...]
    pictures: tuple[Picture, ...]
    boxes: tuple[Box, ...]

    @property
    def length(self) -> float:
        """What "a room length" means."""
        return max(self.width, self.depth)

    @property
    def caption(self) -> str:
        """Such as "a room with red striped walls and a brown plain floor, a picture of coffee, a blue box"."""
        pictures = [f"a picture of {picture.word}" for picture in self.pictures]
        return ", ".join(
            [
                f"a room with {self.words[0]} walls and a {self.words[1]} floor",
                *pictures,
                *(box.words for box in self.boxes),
            ]
        )

    def free(self, x: float, z: float) -> bool:
        """Whether a camera may stand there."""
        inside = abs(x) <= self.width / 2 - MARGIN and abs(z) <= self.depth / 2 - MARGIN
        return inside and not any(
            box.low[0] - MARGIN < x < box.high[0] + MARGIN and box.low[2] - MARGIN < z < box.high[2] + MARGIN
            for box in self.boxes
        )


class Draw(digits.Draw):
    """With what rooms need besides."""

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def seed(self) -> int:
        return int(torch.randint(2**40, (), generator=self.generator))


def random_room(generator: torch.Generator, split: str) -> Room:
    """A room with two to four pictures of the split, and up to three boxes."""
    draw = Draw(generator)
    width, depth, height = draw.between(4, 7), draw.between(4, 7), draw.between(2.4, 3.2)
    colours, names = list(COLOURS), photographs_of(split)
    wall, floor, above = ((draw.pick(PATTERNS), draw.pick(colours)) for _ in range(3))
    walls = [texture(*wall, draw.seed()) for _ in SIDES]
    walls += [texture(*floor, draw.seed()), texture("plain", above[1], draw.seed())]
    pictures = tuple(
        _picture(draw, side, width if side in ("far", "near") else depth, [each.word for each in names])
        for side in SIDES
        if draw.unit() < 0.75
    ) or (_picture(draw, "far", width, [each.word for each in names]),)
    boxes = tuple(_box(draw, width, depth, colours) for _ in range(int(draw.between(0, 3.99))))
    words = (f"{wall[1]} {wall[0]}", f"{floor[1]} {floor[0]}")
    return Room(width, depth, height, tuple(walls), words, pictures, boxes)


def _picture(draw: Draw, side: str, span: float, names: list[str]) -> Picture:
    half, word = draw.between(0.45, 0.8), draw.pick(names)
    return Picture(
        side, draw.between(-span / 2 + 1, span / 2 - 1), draw.between(1.3, 1.7), half, photograph(word), word
    )


def _box(draw: Draw, width: float, depth: float, colours: list[str]) -> Box:
    """Along the walls, so that the middle stays free."""
    size, tall, colour = draw.between(0.4, 0.9), draw.between(0.4, 1.3), draw.pick(colours)
    x = draw.pick(("-1", "1"))
    middle = float(x) * (width / 2 - size / 2 - 0.05), draw.between(-depth / 2 + 0.7, depth / 2 - 0.7)
    low, high = (middle[0] - size / 2, -tall, middle[1] - size / 2), (middle[0] + size / 2, 0.0, middle[1] + size / 2)
    return Box(low, high, texture(draw.pick(PATTERNS), colour, draw.seed()), f"a {colour} box")
