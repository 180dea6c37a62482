"""A tiny model of the family, a random video for it, and how its chunks are run on plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtake.training.models.sana_wm.attention import Camera
from longtake.training.models.sana_wm.camera import chunk_maps
from longtake.training.models.sana_wm.config import SanaWMConfig
from longtake.training.models.sana_wm.dit import Chunk, SanaWMDiT
from longtake.training.models.sana_wm.memory import Memory
from longtake.training.models.sana_wm.rope import tables
from longtake.training.models.wan.rope import timestep_sinusoid

GRID, STRIDE = (3, 4), 8
CONFIG = SanaWMConfig(
    dim=32, ffn_dim=96, layers=4, heads=2, channels=6, text_dim=12, text_len=8, softmax_every=4, plucker_channels=48
)


def filled(module: nn.Module, seed: int = 0, size: float = 0.5) -> nn.Module:
    """With random weights everywhere, also where training starts from zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size / fan**0.5)
    return module


@dataclass
class Video:
    """latents [C, N, h, w]; poses float64 [M, 4, 4], intrinsics [M, 4], of all frames; text [E, D]."""

    latents: Tensor
    poses: Tensor
    intrinsics: Tensor
    text: Tensor

    def cameras(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        return chunk_maps(self.poses, self.intrinsics, range(start, stop), STRIDE, GRID)

    def maps(self, start: int, stop: int) -> Tensor:
        return self.cameras(start, stop)[2]

    @property
    def conditions(self) -> Tensor:
        """As the publisher's network takes them: pose and intrinsics of each latent frame."""
        return torch.cat((self.poses[::STRIDE].flatten(-2), self.intrinsics[::STRIDE]), -1).float()

    def sinusoid(self, times: Tensor) -> Tensor:
        return timestep_sinusoid(times, 256)


def random_video(latents: int, seed: int = 0) -> Video:
    generator = torch.Generator().manual_seed(seed)
    frames = 1 + STRIDE * (latents - 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    steps = torch.zeros(frames, 4, 4, dtype=torch.float64)
    steps[:, 0, 2], steps[:, 2, 0] = 0.01, -0.01
    steps[:, :3, 3] = 0.02 * draw(frames, 3).double()
    poses = [torch.eye(4, dtype=torch.float64)]
    for step in steps[1:]:
        poses.append(poses[-1] @ torch.linalg.matrix_exp(step))
    intrinsics = torch.tensor([3.5, 3.6, 2.0, 1.5]).expand(frames, 4)
    return Video(draw(6, latents, *GRID), torch.stack(poses), intrinsics, draw(8, 12))


def chunk_of(dit: SanaWMDiT, video: Video, memory: Memory, start: int, stop: int) -> Chunk:
    config = dit.config
    rays, inverse, maps = video.cameras(start, stop)
    frames = list(range(start, stop))
    rope = tables(config.head_dim, frames, GRID, config.rope_theta)
    half = tables(config.head_dim, frames, GRID, config.rope_theta, config.head_dim // 2)
    return Chunk(rope, Camera(rays, inverse, half), dit.plucker(maps), memory.attend, memory.carried)


def plan_of_chunks(latents: int) -> list[range]:
    edges = [0, *range(4, latents + 1, 3)]
    return [range(a, b) for a, b in zip(edges, edges[1:])]


@torch.no_grad()
def run_video(dit: SanaWMDiT, video: Video, memory: Memory, first: int = 0, chunks: int | None = None) -> Tensor:
    """One pass at timestep 0 a chunk, committed; velocities [C, N, h, w]."""
    out = []
    for part in plan_of_chunks(video.latents.shape[1])[first:chunks]:
        chunk = chunk_of(dit, video, memory, part.start, part.stop)
        latents, times = video.latents[:, part.start : part.stop], torch.zeros(len(part))
        velocity, kept = dit(latents, video.sinusoid(times), dit.context(video.text), torch.zeros(8), chunk)
        memory.commit(kept)
        out.append(velocity)
    return torch.cat(out, 1)
