"""Keys held to where a camera goes: w s forward and back, j l left and right, a d turn left and right, i k look up and down.

A key pressed anew takes hold at once; one released lets the camera coast. Axes are OpenCV's: x right, y down, z forward.
All of it is float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longtake.errors import LongtakeError

KEYS = "wsadikjl"
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
HELD, COASTING = 0.45, 1.0  # seconds in which a component comes near its target, and near rest
MOST_PITCH = math.radians(60)
MOST_FRAMES = 1_000_000
FIX = "write such as 'w-24, wd-12, none-6'"

Quad = tuple[float, float, float, float]
Matrix = tuple[float, ...]  # 16 numbers, row by row
IDENTITY: Matrix = tuple(float(i % 5 == 0) for i in range(16))


@dataclass(frozen=True)
class Pace:
    """How fast keys move a camera: metres, and degrees, a frame. fps: frames a second."""

    speed: float = 0.025
    turn: float = 0.6
    fps: float = 16.0

    def __post_init__(self) -> None:
        for name in ("speed", "turn"):
            if not (math.isfinite(getattr(self, name)) and 0 <= getattr(self, name) <= 45):
                raise LongtakeError(f"bad {name}", got=getattr(self, name), expected="0 to 45", fix="leave it out")

    def wanted(self, keys: str) -> Quad:
        """The velocity that held keys ask for: forward, right, yaw (right) and pitch (up), in metres and radians a frame."""

        def axis(more: str, less: str) -> int:
            return (more in keys) - (less in keys)

        turn = math.radians(self.turn)
        return axis("w", "s") * self.speed, axis("l", "j") * self.speed, axis("d", "a") * turn, axis("i", "k") * turn


def checked_keys(keys: str, where: str = "the action") -> str:
    """Held keys, each once, in one order. Raises LongtakeError for an unknown one, and names the nearest known."""
    lower = keys.strip().lower()
    if lower in ("", "none"):
        return ""
    for key in lower:
        if key not in KEYS:
            near = min(KEYS, key=lambda known: _apart(key, known))
            what, got = f"unknown key in {where}", repr(key)
            expected, fix = f"{' '.join(KEYS)} or none", f"did you mean {near!r}?"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return "".join(key for key in KEYS if key in lower)


def _apart(one: str, other: str) -> float:
    """How far apart two keys lie on a keyboard, squared."""
    places = {key: (row, column + row / 3) for row, line in enumerate(ROWS) for column, key in enumerate(line)}
    (row, column), (other_row, other_column) = places.get(one, (0, 0.0)), places[other]
    return (row - other_row) ** 2 + (column - other_column) ** 2


def keys_of_frames(action: str) -> tuple[str, ...]:
    """The keys held in each frame of an action string: KEYS-FRAMES, joined by commas; white space and case don't matter.

    Raises:
        LongtakeError: a part is not of this form, or a key is unknown.
    """
    frames: list[str] = []
    for part in "".join(action.split()).replace("\uff0c", ",").split(","):
        match = re.fullmatch(r"([^-]+)-([0-9]{1,7})", part)
        if not match or not 0 < int(match[2]) <= MOST_FRAMES - len(frames):
            raise LongtakeError("bad action", got=repr(part), expected="KEYS-FRAMES, joined by commas", fix=FIX)
        frames += [checked_keys(match[1], f"action {part!r}")] * int(match[2])
    return tuple(frames)


def _turn_x(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=np.float64)


def _turn_y(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=np.float64)


def _level(axis: np.ndarray) -> np.ndarray:
    flat = np.array([axis[0], 0.0, axis[2]])
    return flat / (np.linalg.norm(flat) + 1e-6)


@dataclass(frozen=True)
class Walk:
    """Where a camera is, camera to world, and how it moves: see `Pace.wanted`. held: the keys of the last frame."""

    pose: Matrix = IDENTITY
    velocity: Quad = (0.0, 0.0, 0.0, 0.0)
    pitch: float = 0.0
    held: str = ""

    def step(self, keys: str, pace: Pace) -> Walk:
        """The next frame, while `keys` are held."""
        fresh = bool(set(keys) - set(self.held))
        return self.towards(pace.wanted(keys), pace, keys, fresh)

    def towards(self, target: Quad, pace: Pace, keys: str = "", at_once: bool = False) -> Walk:
        """The next frame, with the velocity on its way to `target`."""
        velocity = target if at_once else tuple(map(lambda now, to: _nearer(now, to, pace.fps), self.velocity, target))
        forward, right, yaw, up = velocity
        pitch = min(max(self.pitch + up, -MOST_PITCH), MOST_PITCH)
        pose = np.array(self.pose).reshape(4, 4)
        turned = _turn_y(yaw) @ pose[:3, :3] @ _turn_x(pitch - self.pitch)
        moved = pose[:3, 3] + _level(turned[:, 2]) * forward + _level(turned[:, 0]) * right
        pose[:3, :3], pose[:3, 3] = turned, moved
        return Walk(tuple(pose.flatten().tolist()), (forward, right, yaw, up), pitch, keys)

    def at(self, pose: np.ndarray) -> Walk:
        """At rest at `pose`."""
        pitch = math.asin(min(max(-float(pose[1, 2]), -1.0), 1.0))
        return Walk(tuple(np.asarray(pose, np.float64).flatten().tolist()), pitch=pitch)


def _nearer(now: float, to: float, fps: float) -> float:
    """A component a frame later."""
    share = 1 - math.exp(-1 / fps / (HELD if to else COASTING))
    return now + (to - now) * share


def roll_out(keys: Sequence[str], pace: Pace, start: Walk | None = None) -> tuple[np.ndarray, Walk]:
    """The poses of so many frames after `start`, float64 [N, 4, 4], and how the camera is then."""
    walk, poses = start or Walk(), []
    for held in keys:
        walk = walk.step(held, pace)
        poses.append(walk.pose)
    return np.array(poses).reshape(-1, 4, 4), walk
