"""Cameras as the network reads them: rays of a latent frame's tokens, and maps of where they come from and point.

Poses are camera to world, 4x4, OpenCV axes (x right, y down, z forward), relative to the video's first frame. Intrinsics are
fx, fy, cx, cy in pixels of the latent grid, whose columns and rows are counted 0, 1, ...: no half pixel is added.

Legend: N frames, F latent frames, h, w latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ray_directions(intrinsics: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Where each token looks in its camera's axes, of intrinsics [..., 4]: [..., h * w, 3], depth 1."""
    height, width = grid_hw
    rows, columns = (torch.arange(n, dtype=intrinsics.dtype, device=intrinsics.device) for n in (height, width))
    fx, fy, cx, cy = intrinsics[..., None].unbind(-2)
    x = ((columns - cx) / fx)[..., None, :].expand(*intrinsics.shape[:-1], height, width)
    y = ((rows - cy) / fy)[..., :, None].expand_as(x)
    return torch.stack((x, y, torch.ones_like(x)), -1).flatten(-3, -2)


def ray_matrices(poses: Tensor, intrinsics: Tensor, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """World to each token's ray axes, and back: poses [F,4,4], intrinsics [F,4] to two of [F, h * w, 4, 4].

    z is the ray, x at right angles to it and to the camera's y axis; the origin is the camera's.
    """
    rotation, place = poses[..., :3, :3], poses[..., :3, 3]
    z = functional.normalize(ray_directions(intrinsics, grid_hw) @ rotation.mT, dim=-1)
    down = rotation[..., :, 1].unsqueeze(-2).expand_as(z)
    x = functional.normalize(torch.linalg.cross(down, z), dim=-1)
    y = functional.normalize(torch.linalg.cross(z, x), dim=-1)
    rows = torch.stack((x, y, z), -2)
    there = place[..., None, :, None].expand(*rows.shape[:-1], 1)
    last = torch.zeros_like(rows[..., :1, :])
    last = torch.cat((last, torch.ones_like(last[..., :1])), -1)
    matrix = torch.cat((torch.cat((rows, -rows @ there), -1), last), -2)
    return matrix, torch.cat((torch.cat((rows.mT, there), -1), last), -2)


def plucker_maps(poses: Tensor, intrinsics: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Direction and moment (origin x direction) of each token's ray: poses [N,4,4], intrinsics [N,4] to [N,6,h,w]."""
    rotation, place = poses[..., :3, :3], poses[..., :3, 3]
    ray = functional.normalize(ray_directions(intrinsics, grid_hw) @ rotation.mT, dim=-1)
    moment = torch.linalg.cross(place.unsqueeze(-2).expand_as(ray), ray)
    return torch.cat((ray, moment), -1).mT.unflatten(-1, grid_hw)


def frames_of_latent(latent: int, stride: int) -> range:
    """The video frames whose maps latent frame `latent` is given: those it stands for; the first is given the first ones."""
    start = max(0, stride * latent - (stride - 1))
    return range(start, start + stride)


def chunk_maps(
    poses: Tensor, intrinsics: Tensor, latents: range, stride: int, grid_hw: tuple[int, int], start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What a chunk of `latents` reads of a video's cameras from frame `start` on, poses [...,N,4,4], intrinsics [...,N,4].

    Where the poses end, the last one stays. Returns rays and their inverses, fp32 [..., F, h * w, 4, 4], of the last frame of
    each latent, and maps, fp32 [..., 6 * stride, F, h, w], frame by frame.
    """
    poses, intrinsics, last = poses.double(), intrinsics.double(), poses.shape[-3] - 1
    at = torch.tensor([min(stride * latent - start, last) for latent in latents])
    matrix, inverse = ray_matrices(poses[..., at, :, :], intrinsics[..., at, :], grid_hw)
    frames = torch.tensor(
        [min(frame - start, last) for latent in latents for frame in frames_of_latent(latent, stride)]
    )
    maps = plucker_maps(poses[..., frames, :, :], intrinsics[..., frames, :], grid_hw)  # [..., F * stride, 6, h, w]
    maps = maps.unflatten(-4, (len(latents), stride)).flatten(-4, -3).transpose(-4, -3)
    return matrix.float(), inverse.float(), maps.float().contiguous()
