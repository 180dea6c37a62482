"""Walks through rooms, rendered once and encoded by a frozen VAE: what a world's transformer trains on.

Legend: S walks, B of them in a batch, F latent frames, C channels, h, w latent size, T video frames, E text length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from longtake.training.data.base import item_generator
from longtake.training.data.latent_cache import encode
from longtake.training.data.loader import read_in_order
from longtake.training.data.rooms.rooms import Rooms
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import AnyTextEncoder


@dataclass(frozen=True)
class Walks:
    """latents [S, C, F, h, w], bf16 on a GPU, else fp32; tokens int32 [S, E]; poses float64 [S, T, 4, 4], seen from the first
    frame; intrinsics float64 [S, 4] in pixels of the latents."""

    latents: Tensor
    tokens: Tensor
    poses: Tensor
    intrinsics: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, index: Tensor, preset: Preset, chunks: int) -> Walks:
        """The first `chunks` chunks of walks `index`, latents in fp32."""
        frames = preset.first_frame(chunks)
        shown = 1 + preset.vae.stride[0] * (frames - 1)
        latents = self.latents[index, :, :frames].float()
        return Walks(latents, self.tokens[index], self.poses[index, :shown], self.intrinsics[index])


@dataclass(frozen=True)
class WalkAt:
    """Of walk i of a seed its frames, poses, intrinsics and caption, for processes that render ahead: it depends on `seed` and i
    alone."""

    rooms: Rooms
    seed: int
    frames: int

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray, Tensor, str]:
        walk = self.rooms.walk(item_generator(self.seed, index), self.frames)
        return walk.frames, walk.poses, walk.intrinsics, walk.caption


@torch.no_grad()
def walks_from_rooms(
    rooms: Rooms,
    vae: torch.nn.Module,
    text: AnyTextEncoder,
    walks: int,
    chunks: int,
    seed: int,
    what: str,
    workers: int,
) -> Walks:
    """`walks` walks of `chunks` chunks on the VAE's device, the same for any number of `workers` that render them."""
    preset, device = rooms.preset, next(vae.parameters()).device
    frames = 1 + preset.vae.stride[0] * (preset.first_frame(chunks) - 1)
    grid = torch.tensor([preset.latent_hw[1] / preset.width, preset.latent_hw[0] / preset.height] * 2)
    latents, poses, intrinsics, captions = [], [], [], []
    rendered = read_in_order(WalkAt(rooms, seed, frames), range(walks), min(workers, walks))
    for seen, places, camera, caption in tqdm(
        rendered, total=walks, unit="walk", desc=f"encode {what}", dynamic_ncols=True
    ):
        video = seen.transpose(0, 1)[None].to(device)
        latents.append(encode(vae, video).transpose(1, 2)[0])
        poses.append(torch.from_numpy(places))
        intrinsics.append((camera * grid).double())
        captions.append(caption)
    tokens = text.tokenize(captions)
    return Walks(*(x.to(device) for x in (torch.stack(latents), tokens, torch.stack(poses), torch.stack(intrinsics))))
