"""What a story of moving digits is: scans, shots, and the story they make."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Shot:
    """One shot, or a part of one. `chunks` is its length; x, y (in -1..1), phase and speed (1 is usual) vary its motion.

    joined: it goes on where the part before it stopped, without a cut, under a new prompt. named: the prompt tells the
    subject's colour; otherwise only an earlier shot does.
    """

    digit: int
    scan: int
    colour: str
    motion: str
    background: str
    light: str
    chunks: int
    x: float = 0.0
    y: float = 0.0
    phase: float = 0.0
    speed: float = 1.0
    joined: bool = False
    named: bool = True


@dataclass(frozen=True)
class Story:
    """Shots in order; a cut lies before each that isn't joined to the one before."""

    shots: tuple[Shot, ...]

    @property
    def chunks(self) -> int:
        return sum(shot.chunks for shot in self.shots)


@lru_cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans, fp32 [N,8,8] in [0,1], and their classes, int [N]."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    return bundle.images.astype(np.float32) / 16.0, bundle.target
