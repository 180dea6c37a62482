"""What every data set offers to a training stage, and how one is named on the command line."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.training.data.facts import Facts
from longtake.training.models.presets import Preset

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Batch:
    """Videos with one prompt a chunk.

    video: fp32 [B,3,T,H,W] in [-1,1], T = chunk_frames(preset, chunks).
    prompts: prompts[b][chunk], with the cut prefix where a shot begins (not at the start of the video).
    cuts: cuts[b][chunk], True where the chunk is the first of a shot other than the first.
    """

    video: Tensor
    prompts: list[list[str]]
    cuts: list[list[bool]]


@dataclass(frozen=True)
class Take:
    """One story as worker processes hand it over.

    key: digest of what it shows. frames: uint8 [T,H,W,3], None where `key` was already known. prompts, cuts: as in
    `Batch`. facts: what was found out about clips on the way.
    """

    key: str
    frames: np.ndarray | None
    prompts: list[str]
    cuts: list[bool]
    facts: Facts


class Dataset(Protocol):
    """A source of multi-shot videos. All randomness comes from the caller's CPU generator."""

    @property
    def line(self) -> str:
        """What there is, in one line; "" where a name says it all."""
        ...

    def lacking(self, chunks: int = 0, frames: int = 0) -> str:
        """What of it is too short for stories of so many chunks, or clips of so many frames, in a sentence; "" for nothing.

        Raises:
            LongtakeError: all of it is.
        """
        ...

    @property
    def captions(self) -> list[str]:
        """Texts with every word that its prompts are made of."""
        ...

    def sample(self, generator: torch.Generator, chunks: int, batch: int, device: torch.device) -> Batch:
        """Draw `batch` videos of `chunks` chunks."""
        ...

    def clips(self, generator: torch.Generator, frames: int, batch: int, device: torch.device) -> Tensor:
        """Draw `batch` short clips, fp32 [B,3,frames,H,W] in [-1,1]."""
        ...

    def take(self, index: int, seed: int, chunks: int, known: Container[str] = ()) -> Take:
        """Story `index` of the endless list that `seed` stands for, `chunks` chunks long; not rendered if known."""
        ...


def told(train: Dataset, held_out: Dataset, chunks: int = 0, frames: int = 0) -> str:
    """What there is to train on, and what of it is too short, a line each. Raises LongtakeError if all of it is."""
    lacking = (data.lacking(chunks, frames) for data in (train, held_out))
    return "\n".join(dict.fromkeys(filter(None, (train.line, *lacking))))


def chunk_frames(preset: Preset, chunks: int) -> int:
    """Pixel frames of the first `chunks` chunks of a video: 29, 61, 93, … for the tiny preset."""
    return 1 + preset.vae.stride[0] * (preset.chunk_latents * chunks - 1)


def chunk_starts(preset: Preset, chunks: int) -> list[int]:
    """First pixel frame of each chunk: 0, 29, 61, … for the tiny preset."""
    return [0, *(chunk_frames(preset, i) for i in range(1, chunks))]


def item_generator(seed: int, index: int) -> torch.Generator:
    """The randomness of item `index` of a list of stories, whoever makes it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
