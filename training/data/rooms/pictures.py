"""The photographs on the walls: those that ship in scikit-image and scikit-learn, and textures drawn from a seed.

No medical pictures; no faces but one in the public domain. Licences are what the packages' own notes say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from longtake.errors import UnavailableError
from longtake.training.models.text.room_grammar import PATTERNS as PATTERNS

SIZE = 128  # pixels of a texture's side


@dataclass(frozen=True)
class Photograph:
    """word: what captions call it. package, file: where it ships. split: of which rooms it hangs in."""

    word: str
    package: str
    file: str
    licence: str
    split: str = "train"


PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "astronaut.png", "public domain (NASA)"),
    Photograph("coffee", "skimage", "coffee.png", "CC0 (Rachel Michetti)"),
    Photograph("rocket", "skimage", "rocket.jpg", "public domain (SpaceX)"),
    Photograph("temple", "sklearn", "china.jpg", "CC BY 2.0 (danielbuechele)"),
    Photograph("grass", "skimage", "grass.png", "CC0 (DeclanTM)"),
    Photograph("gravel", "skimage", "gravel.png", "CC0 (CC0Textures)"),
    Photograph("brick", "skimage", "brick.png", "CC0 (CC0Textures)"),
    Photograph("photographer", "skimage", "camera.png", "CC0 (Lav Varshney)", "eval"),
    Photograph("coins", "skimage", "coins.png", "no known copyright restrictions (Brooklyn Museum)", "eval"),
    Photograph("galaxies", "skimage", "hubble_deep_field.jpg", "public domain (NASA)", "eval"),
    Photograph("clock", "skimage", "clock_motion.png", "public domain (Stefan van der Walt)", "eval"),
    Photograph("flower", "sklearn", "flower.jpg", "CC BY 2.0 (vultilion)", "eval"),
)
PLACES = {"skimage": "data", "sklearn": "datasets/images"}
COLOURS = {
    "red": (0.72, 0.22, 0.20),
    "green": (0.28, 0.55, 0.30),
    "blue": (0.25, 0.38, 0.70),
    "yellow": (0.85, 0.72, 0.30),
    "white": (0.88, 0.87, 0.84),
    "grey": (0.50, 0.50, 0.52),
    "brown": (0.48, 0.33, 0.22),
    "violet": (0.50, 0.32, 0.60),
}


def photographs_of(split: str) -> list[Photograph]:
    """Those that hang in the rooms of a split."""
    return [each for each in PHOTOGRAPHS if each.split == split]


@lru_cache
def photograph(word: str) -> Tensor:
    """Its middle, fp32 [3, SIZE, SIZE] in [0, 1].

    Raises:
        UnavailableError: the package that ships it is not installed.
    """
    import importlib

    from longtake.image import image_from_file

    found = next(each for each in PHOTOGRAPHS if each.word == word)
    try:
        package = importlib.import_module(found.package)
    except ImportError:
        raise UnavailableError(
            f"the data set rooms needs {found.package}", got="not installed", fix="pip install longtake[world]"
        ) from None
    path = Path(str(package.__file__)).parent / PLACES[found.package] / found.file
    return image_from_file(path, SIZE, SIZE) * 0.5 + 0.5


def texture(pattern: str, colour: str, seed: int) -> Tensor:
    """A procedural texture, fp32 [3, SIZE, SIZE] in [0, 1]; no two seeds give the same one."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.tensor(COLOURS[colour]).reshape(3, 1, 1)
    rows = torch.linspace(0, 1, SIZE)[:, None].expand(SIZE, SIZE)
    columns = rows.T
    phase, count = torch.rand(2, generator=generator), int(torch.randint(3, 8, (), generator=generator))
    shade = {
        "plain": torch.zeros(SIZE, SIZE),
        "striped": _square(columns * count + phase[0]),
        "checked": (_square(columns * count + phase[0]) != _square(rows * count + phase[1])).float(),
        "bricked": _bricks(rows, columns, count),
        "mottled": torch.zeros(SIZE, SIZE),
    }[pattern]
    grain = torch.zeros(SIZE, SIZE)
    for size, weight in ((4, 0.5), (8, 0.3), (16, 0.2)):
        noise = torch.rand(1, 1, size, size, generator=generator)
        grain += weight * functional.interpolate(noise, (SIZE, SIZE), mode="bilinear", align_corners=True)[0, 0]
    strength = 0.9 if pattern == "mottled" else 0.35
    return (base * (1 - 0.35 * shade) * (1 - strength * (grain - 0.5))).clamp(0, 1)


def _square(x: Tensor) -> Tensor:
    return (x % 1 < 0.5).float()


def _bricks(rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """Joints between bricks, every other row moved by half of one."""
    y = rows * count * 2
    x = columns * count + 0.5 * (y.floor() % 2)
    return ((y % 1 < 0.12) | (x % 1 < 0.06)).float()
