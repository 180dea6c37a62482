"""Render stories of digits: a batch of videos at once, on any device.

Per frame, a small table of numbers (which scan, where, how large, which colours, which light) is computed on the CPU;
the pixels are one `grid_sample` and a few products. The frame is a torus: what drifts out on one side comes in on the
other, so a motion can go on for ever. Lengths are in units of half the frame (-1 is left or top, +1 right or bottom).

Legend: B stories, T frames, N = B T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.data.base import chunk_frames
from longtake.training.data.digit_stories import Shot, Story, load_scans
from longtake.training.models.presets import Preset
from longtake.training.models.text.grammar import MOTIONS

GLYPH = 64  # texture size of an enlarged scan
SIZE = 0.50  # half the glyph's edge: 64 of 128 pixels, of which the ink takes about two thirds
DRIFT = 0.45  # half frames a second: about 29 of 128 pixels
CIRCLE = 0.40  # radius
TURN = 2.4  # seconds of a circle
SWAY = 1.6  # seconds of a sway

RGB = {
    "red": (0.95, 0.15, 0.12),
    "green": (0.20, 0.85, 0.25),
    "blue": (0.20, 0.40, 1.00),
    "yellow": (1.00, 0.90, 0.15),
    "white": (1.00, 1.00, 1.00),
    "purple": (0.75, 0.25, 0.90),
    "orange": (1.00, 0.55, 0.10),
    "cyan": (0.15, 0.90, 0.95),
}
# Colour at the top and at the bottom of the frame.
BACKGROUND = {
    "dark blue": ((0.05, 0.08, 0.35), (0.05, 0.08, 0.35)),
    "dark green": ((0.03, 0.26, 0.08), (0.03, 0.26, 0.08)),
    "dark red": ((0.34, 0.04, 0.05), (0.34, 0.04, 0.05)),
    "black": ((0.03, 0.03, 0.03), (0.03, 0.03, 0.03)),
    "grey": ((0.42, 0.42, 0.42), (0.42, 0.42, 0.42)),
    "sunset": ((0.28, 0.08, 0.36), (0.62, 0.30, 0.12)),
    "sea": ((0.12, 0.42, 0.50), (0.02, 0.08, 0.26)),
    "forest": ((0.30, 0.38, 0.16), (0.10, 0.08, 0.03)),
}
# Brightness of the frame is level + dx x + dy y - fall (x² + y²).
LIGHT = {
    "soft light": (1.05, 0.0, 0.0, 0.18),
    "light from the left": (0.85, -0.55, 0.0, 0.0),
    "light from the right": (0.85, 0.55, 0.0, 0.0),
    "light from above": (0.85, 0.0, -0.55, 0.0),
}


@lru_cache(maxsize=4)
def glyphs(device: torch.device) -> Tensor:
    """All scans, enlarged smoothly and with firm edges, fp32 [N,1,GLYPH,GLYPH] in [0,1]."""
    scans = torch.from_numpy(load_scans()[0]).unsqueeze(1)
    padded = F.pad(scans, (1, 1, 1, 1))
    large = F.interpolate(padded, size=(GLYPH, GLYPH), mode="bicubic", align_corners=False).clamp(0, 1)
    ramp = ((large - 0.22) / 0.40).clamp(0, 1)
    return (ramp * ramp * (3 - 2 * ramp)).to(device)


def render_stories(
    stories: Sequence[Story], preset: Preset, device: torch.device, frames: int, starts: Sequence[int]
) -> Tensor:
    """Render `frames` frames of each story from its frame `starts[b]`, fp32 [B,3,T,H,W] in [-1,1]."""
    shots, index, seconds = _frame_table(stories, preset, frames, starts)
    motion = _motion(shots, index, seconds)
    table = torch.tensor([_numbers(shot) for shot in shots])[index]
    values = torch.cat([motion, table], 1).to(device, non_blocking=True)
    scans = torch.tensor([shot.scan for shot in shots])[index].to(device)
    video_N3HW = _paint(values, glyphs(device)[scans], preset.height, preset.width)
    return video_N3HW.view(len(stories), frames, 3, preset.height, preset.width).transpose(1, 2)


def _frame_table(
    stories: Sequence[Story], preset: Preset, frames: int, starts: Sequence[int]
) -> tuple[list[Shot], Tensor, Tensor]:
    """All shots; for each of the N frames the index of its shot and the seconds since that shot began."""
    shots: list[Shot] = []
    index, seconds = [], []
    for story, start in zip(stories, starts):
        at = torch.arange(start, start + frames)
        begins: list[int] = []
        clocks: list[int] = []  # the frame from which each part counts its seconds
        chunks = 0
        for shot in story.shots:
            begins.append(chunk_frames(preset, chunks) if chunks else 0)
            clocks.append(clocks[-1] if shot.joined else begins[-1])
            chunks += shot.chunks
        which = torch.bucketize(at, torch.tensor(begins), right=True) - 1
        index.append(which + len(shots))
        seconds.append((at - torch.tensor(clocks)[which]) / preset.fps)
        shots.extend(story.shots)
    return shots, torch.cat(index), torch.cat(seconds)


def _motion(shots: list[Shot], index: Tensor, seconds: Tensor) -> Tensor:
    """Centre x, y, half edge and angle (radians) of the glyph in each of the N frames, fp32 [N,4]."""
    paths = torch.tensor([[MOTIONS.index(s.motion), s.x, s.y, s.phase, s.speed] for s in shots])[index]
    kind, x0, y0, phase, speed = paths.unbind(1)
    t = seconds * speed
    turn = 2 * math.pi * (t / TURN + phase)
    swing = torch.sin(2 * math.pi * (t / SWAY + phase))
    near = torch.stack([0.35 * x0, 0.35 * y0, torch.full_like(t, SIZE), torch.zeros_like(t)], 1)
    still = torch.zeros_like(t)
    rest = 1 - torch.exp(-t / 1.5)  # grows and shrinks come to rest in the frame
    offsets = {
        "drifts left": (0.3 - DRIFT * t, still, still, still),
        "drifts right": (DRIFT * t - 0.3, still, still, still),
        "rises": (still, 0.3 - DRIFT * t, still, still),
        "sinks": (still, DRIFT * t - 0.3, still, still),
        "circles": (CIRCLE * torch.cos(turn), CIRCLE * torch.sin(turn), still, still),
        "sways": (0.22 * swing, still, still, 0.35 * swing),
        "stands still": (still, still, still, still),
        "grows": (still, still, -0.20 + 0.45 * rest, still),
        "shrinks": (still, still, 0.25 - 0.45 * rest, still),
    }
    moves = torch.stack([torch.stack(offsets[name], 1) for name in MOTIONS], 1)
    return near + moves[torch.arange(len(t)), kind.long()]


def _numbers(shot: Shot) -> list[float]:
    """Digit colour (3), background at the top (3) and at the bottom (3), light (4)."""
    top, bottom = BACKGROUND[shot.background]
    return [*RGB[shot.colour], *top, *bottom, *LIGHT[shot.light]]


def _paint(values: Tensor, glyph_N1GG: Tensor, height: int, width: int) -> Tensor:
    """Frames from the table [N,17] and the glyph of each, fp32 [N,3,H,W] in [-1,1]."""
    y = (torch.arange(height, device=values.device) * 2 + 1).view(1, -1, 1) / height - 1
    x = (torch.arange(width, device=values.device) * 2 + 1).view(1, 1, -1) / width - 1
    cx, cy, half, angle = (v.view(-1, 1, 1) for v in values[:, :4].unbind(1))
    dx, dy = torch.remainder(x - cx + 1, 2) - 1, torch.remainder(y - cy + 1, 2) - 1
    cos, sin = torch.cos(angle) / half, torch.sin(angle) / half
    grid = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], -1)
    ink = F.grid_sample(glyph_N1GG, grid, align_corners=False)
    digit, top, bottom = (values[:, i : i + 3].view(-1, 3, 1, 1) for i in (4, 7, 10))
    ground = torch.lerp(top, bottom, ((y + 1) / 2).unsqueeze(1))
    level, lx, ly, fall = (v.view(-1, 1, 1) for v in values[:, 13:17].unbind(1))
    light = (level + lx * x + ly * y - fall * (x * x + y * y)).unsqueeze(1)
    return (torch.lerp(ground, digit, ink) * light).clamp(0, 1) * 2 - 1
