"""The subject in a frame: its ink, unmixed from the known background and light, the ink's colour, and its shape.

Legend: N frames, K colours, H, W sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from longtake.training.data.digit_stories import Shot
from longtake.training.data.render import BACKGROUND, LIGHT, RGB
from longtake.training.models.text.grammar import COLOURS

SIZE = 32  # of a shape
LEAST = 20  # pixels of ink; with fewer there is no subject


def ink_seen(frames: Tensor, shot: Shot) -> tuple[Tensor, Tensor]:
    """Of frames [N, 3, H, W] in [-1, 1] the ink in the colour that explains each best, [N, H, W], and that colour's place
    in COLOURS, int64 [N]."""
    inks, left = unmixed(frames, shot, COLOURS)
    best = left.argmin(0)
    return inks[best, torch.arange(len(frames), device=frames.device)], best


def unmixed(frames: Tensor, shot: Shot, colours: Sequence[str]) -> tuple[Tensor, Tensor]:
    """For each colour the ink, how much of each pixel it is, [K, N, H, W] in 0..1, and how much of the frame it leaves
    unexplained, [K, N]. A pixel is light (ground + ink (colour - ground)); ground and light are what the prompt says.
    """
    height, width = frames.shape[-2:]
    device = frames.device
    y = (torch.arange(height, device=device) * 2 + 1).view(-1, 1) / height - 1
    x = (torch.arange(width, device=device) * 2 + 1).view(1, -1) / width - 1
    top, bottom = (torch.tensor(c, device=device).view(3, 1, 1) for c in BACKGROUND[shot.background])
    ground = torch.lerp(top, bottom, ((y + 1) / 2).expand(height, width))
    level, lx, ly, fall = LIGHT[shot.light]
    light = level + lx * x + ly * y - fall * (x * x + y * y)
    seen = (frames + 1) / 2 / light.clamp(min=0.1) - ground
    inks, left = [], []
    for colour in colours:
        away = torch.tensor(RGB[colour], device=device).view(3, 1, 1) - ground
        inks.append(((seen * away).sum(1) / away.square().sum(0).clamp(min=1e-3)).clamp(0, 1))
        left.append((seen - inks[-1][:, None] * away).square().mean((1, 2, 3)))
    return torch.stack(inks), torch.stack(left)


def shapes(ink_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes [N, SIZE, SIZE] in 0..1, centred and brought to one size, and whether there is one, bool [N].

    The frame is a torus: the centre is a circular mean, and the digit is rolled there before it is measured.
    """
    weight = (ink_NHW > 0.5).float()
    there = weight.sum((1, 2)) >= LEAST
    cy, cx = _centre(weight.sum(2)), _centre(weight.sum(1))
    height, width = ink_NHW.shape[1:]
    dy = (torch.arange(height, device=weight.device) + 0.5) / height - 0.5
    dx = (torch.arange(width, device=weight.device) + 0.5) / width - 0.5
    off_y = torch.remainder(_pixels(dy) - cy[:, None] + 0.5, 1) - 0.5
    off_x = torch.remainder(_pixels(dx) - cx[:, None] + 0.5, 1) - 0.5
    spread = (weight * (off_y.square()[:, :, None] + off_x.square()[:, None])).sum((1, 2))
    half = 2.2 * (spread / weight.sum((1, 2)).clamp(min=1)).sqrt().clamp(min=0.02)
    steps = (torch.arange(SIZE, device=weight.device) * 2 + 1) / SIZE - 1
    gy = (cy[:, None] + half[:, None] * steps) * 2 - 1
    gx = (cx[:, None] + half[:, None] * steps) * 2 - 1
    # Three copies side by side make the torus flat for `grid_sample`.
    tiled = ink_NHW.repeat(1, 3, 3)[:, None]
    grid = torch.stack((gx[:, None, :].expand(-1, SIZE, -1), gy[:, :, None].expand(-1, -1, SIZE)), -1) / 3
    return functional.grid_sample(tiled, grid, align_corners=False)[:, 0], there


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of shapes [..., SIZE, SIZE] at half ink."""
    a, b = first > 0.5, second > 0.5
    return (a & b).sum((-1, -2)) / (a | b).sum((-1, -2)).clamp(min=1)


def _pixels(offset: Tensor) -> Tensor:
    """Place of each pixel in 0..1, of its offset from the middle."""
    return (offset + 0.5)[None]


def _centre(profile: Tensor) -> Tensor:
    """Circular mean, in 0..1, of profiles [N, P] over places (i + 1/2) / P."""
    angle = (torch.arange(profile.shape[1], device=profile.device) + 0.5) * 2 * math.pi / profile.shape[1]
    turn = torch.atan2((profile * angle.sin()).sum(1), (profile * angle.cos()).sum(1))
    return torch.remainder(turn / (2 * math.pi), 1)
