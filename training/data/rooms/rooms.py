"""The data set "rooms": videos of rooms, with captions, and with the camera and depth of every frame.

Rooms, pictures and paths of the two splits are disjoint: they come from other seeds, and other photographs hang there.
Legend: B batch, T video frames, H, W sizes.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtake.training.data.base import Batch, Take, chunk_frames, item_generator
from longtake.training.data.facts import Facts
from longtake.training.data.rooms.paths import random_path
from longtake.training.data.rooms.render import render
from longtake.training.data.rooms.scene import Room, random_room
from longtake.training.data.shards import key_of
from longtake.training.models.camera_poses import relative_poses
from longtake.training.models.presets import Preset
from longtake.training.models.text.room_grammar import room_words

FIELD = (55.0, 70.0)  # degrees across that cameras see
OF_SPLIT = {"train": 0, "eval": 1}


@dataclass(frozen=True)
class Walkthrough:
    """One video: frames fp32 [T,3,H,W] in [-1,1], depth [T,H,W], poses float64 [T,4,4] relative to the first, intrinsics [4]
    in pixels, its caption, the room, and where in it the first frame is."""

    frames: Tensor
    depth: Tensor
    poses: np.ndarray
    intrinsics: Tensor
    caption: str
    room: Room
    start: np.ndarray


class Rooms:
    """See `base.Dataset`; `walk` gives a video with its cameras."""

    def __init__(self, preset: Preset, split: str) -> None:
        self.preset, self.split = preset, split

    @property
    def line(self) -> str:
        """Nothing to say: it is endless."""
        return ""

    @property
    def captions(self) -> list[str]:
        """The words of the captions."""
        return [" ".join(room_words())]

    def lacking(self, chunks: int = 0, frames: int = 0) -> str:
        """Nothing is too short."""
        return ""

    def walk(self, generator: torch.Generator, frames: int) -> Walkthrough:
        """Draw a room and a path through it."""
        seed = 2 * int(torch.randint(2**40, (), generator=generator)) + OF_SPLIT[self.split]
        own = torch.Generator().manual_seed(seed)
        room = random_room(own, self.split)
        poses, _ = random_path(own, room, frames, self.preset.fps)
        across = math.radians(FIELD[0] + (FIELD[1] - FIELD[0]) * float(torch.rand((), generator=own)))
        focal = self.preset.width / 2 / math.tan(across / 2)
        intrinsics = torch.tensor([focal, focal, self.preset.width / 2, self.preset.height / 2])
        seen, depth = render(room, torch.from_numpy(poses), intrinsics, self.preset.height, self.preset.width)
        return Walkthrough(seen, depth, relative_poses(poses), intrinsics, room.caption, room, poses[0])

    def sample(self, generator: torch.Generator, chunks: int, batch: int, device: torch.device) -> Batch:
        """See `base.Dataset`; one prompt a video, and no cuts."""
        walks = [self.walk(generator, self._frames(chunks)) for _ in range(batch)]
        video = torch.stack([walk.frames.transpose(0, 1) for walk in walks]).to(device)
        return Batch(video, [[walk.caption] * chunks for walk in walks], [[False] * chunks for _ in walks])

    def clips(self, generator: torch.Generator, frames: int, batch: int, device: torch.device) -> Tensor:
        """See `base.Dataset`."""
        return torch.stack([self.walk(generator, frames).frames.transpose(0, 1) for _ in range(batch)]).to(device)

    def take(self, index: int, seed: int, chunks: int, known: Container[str] = ()) -> Take:
        """See `base.Dataset`."""
        key = key_of("rooms", self.preset.name, self.split, str(seed), str(index), str(chunks))
        walk = self.walk(item_generator(seed, index), self._frames(chunks))
        pixels = ((walk.frames * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        prompts, cuts = [walk.caption] * chunks, [False] * chunks
        return Take(key, None if key in known else pixels, prompts, cuts, Facts())

    def _frames(self, chunks: int) -> int:
        if not self.preset.first_chunk_latents:
            return chunk_frames(self.preset, chunks)
        return 1 + self.preset.vae.stride[0] * (self.preset.first_frame(chunks) - 1)
