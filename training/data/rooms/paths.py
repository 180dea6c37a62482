"""Where cameras go in a room: random keys, smooth curves, and loops that return to where they began.

Legend: N frames.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from longtake.training.data.rooms.scene import EYE, Draw, Room
from longtake.training.models.sana_wm.actions import Pace, Walk, roll_out

KINDS = ("keys", "curve", "loop", "turn")
HELD = ("w", "w", "wd", "wa", "d", "a", "s", "j", "l", "wj", "wl", "i", "k", "")
TRIES = 40


def random_path(generator: torch.Generator, room: Room, frames: int, fps: float = 16.0) -> tuple[np.ndarray, str]:
    """Poses in the room, float64 [N, 4, 4], whose camera keeps clear of walls and boxes; and the kind of path."""
    draw = Draw(generator)
    kind = draw.pick(KINDS)
    for _ in range(TRIES):
        poses = _at(draw, room) @ _relative(draw, kind, frames, fps)
        if all(room.free(pose[0, 3], pose[2, 3]) for pose in poses[::4]):
            return poses, kind
    return _at(draw, room, middle=True) @ _relative(draw, "turn", frames, fps), "turn"


def _at(draw: Draw, room: Room, middle: bool = False) -> np.ndarray:
    """A camera that stands somewhere and looks anywhere, level."""
    pose, heading = np.eye(4), draw.between(-math.pi, math.pi)
    c, s = math.cos(heading), math.sin(heading)
    pose[:3, :3] = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    for _ in range(TRIES):
        x, z = draw.between(-room.width / 2, room.width / 2), draw.between(-room.depth / 2, room.depth / 2)
        if middle or room.free(x, z):
            break
    pose[:3, 3] = (0, -EYE, 0) if middle else (x, -EYE, z)
    return pose


def _relative(draw: Draw, kind: str, frames: int, fps: float) -> np.ndarray:
    """Seen from the first frame, which is the identity."""
    if kind == "keys":
        keys: list[str] = []
        while len(keys) < frames - 1:
            keys += [draw.pick(HELD)] * int(draw.between(8, 32))
        moved, _ = roll_out(keys[: frames - 1], Pace(fps=fps), Walk())
        return np.concatenate((np.eye(4)[None], moved))
    share = np.linspace(0, 1, frames)
    smooth = share * share * (3 - 2 * share)
    if kind == "loop":  # there, and back to the very pose that it began with
        smooth = np.sin(np.pi * share) ** 2
    turn, ahead, aside = draw.between(-1.4, 1.4), draw.between(-0.4, 1.6), draw.between(-0.6, 0.6)
    if kind == "turn":
        turn, ahead, aside = draw.between(-math.pi, math.pi), 0.0, 0.0
    poses = np.tile(np.eye(4), (frames, 1, 1))
    c, s = np.cos(turn * smooth), np.sin(turn * smooth)
    poses[:, 0, 0] = poses[:, 2, 2] = c
    poses[:, 0, 2], poses[:, 2, 0] = s, -s
    poses[:, 0, 3], poses[:, 2, 3] = aside * smooth, ahead * smooth
    return poses
