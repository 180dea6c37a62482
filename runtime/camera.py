"""A session's camera: a path from a file or an action string, what a user holds meanwhile, and where it stands.

Small, immutable, and part of the session's position: a chunk that fails moves no camera.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.record import record_from_json
from longtake.training.models.presets import Preset
from longtake.training.models.sana_wm.actions import IDENTITY, Matrix, Pace, Quad, Walk, checked_keys

FIRST_FRAME = 1  # the given picture, where the camera starts


@dataclass(frozen=True)
class Steer:
    """From chunk `at` on: keys held, or a velocity in metres and radians a frame, or in chunk `at` alone a way to `pose`,
    which is seen from where the camera then is, or to `target`, which is seen from the first frame."""

    at: int
    keys: str = ""
    velocity: Quad | None = None
    pose: Matrix | None = None
    target: Matrix | None = None

    def way_from(self, here: Matrix) -> np.ndarray | None:
        """Where it leads in its own chunk, seen from `here`; None if it holds for longer."""
        if self.target is not None:
            return np.asarray(np.linalg.inv(np.array(here).reshape(4, 4)) @ np.array(self.target).reshape(4, 4))
        return None if self.pose is None else np.array(self.pose).reshape(4, 4)


@dataclass(frozen=True)
class CameraPosition:
    """Where a session's camera stands.

    walk: at the last frame that is committed. keys: of each frame after the first, from a script. poses: of every frame,
    relative to the first, from a file. intrinsics: in pixels of the latents, one or one a frame. steers: live changes.
    """

    intrinsics: tuple[Quad, ...]
    pace: Pace = Pace()
    walk: Walk = Walk()
    keys: tuple[str, ...] = ()
    poses: tuple[Matrix, ...] = ()
    steers: tuple[Steer, ...] = ()

    def steered(self, steer: Steer) -> CameraPosition:
        """With a live change; of several for one chunk the last holds."""
        kept = tuple(other for other in self.steers if other.at < steer.at)
        return replace(self, steers=(*kept, steer))

    def take(self, preset: Preset, chunk: int) -> tuple[Tensor, Tensor, Walk]:
        """The frames of chunk `chunk`: poses float64 [N, 4, 4], intrinsics [N, 4], and the walk after them."""
        start, count = frames_of_chunk(preset, chunk)
        poses, walk = self._poses(chunk, start, count)
        last = len(self.intrinsics) - 1
        rows = [self.intrinsics[min(frame, last)] for frame in range(start, start + count)]
        return torch.from_numpy(poses), torch.tensor(rows, dtype=torch.float64), walk

    def after(self, walk: Walk, chunk: int) -> CameraPosition:
        """The position once chunk `chunk` is whole, whose walk ended in `walk`."""
        held = [steer for steer in self.steers if steer.at <= chunk][-1:]
        return replace(self, walk=walk, steers=(*held, *(steer for steer in self.steers if steer.at > chunk)))

    def as_in(self, after: CameraPosition | None) -> CameraPosition:
        """With the live changes that the position `after` a chunk tells of: those of that chunk may have come just before it."""
        return self if after is None else replace(self, steers=after.steers)

    def taken_back(self, now: CameraPosition | None, chunk: int) -> CameraPosition:
        """Before chunk `chunk` again, given what the camera is `now`: what was asked for since is still to come."""
        later = () if now is None else tuple(steer for steer in now.steers if steer.at > chunk)
        return replace(self, steers=(*(steer for steer in self.steers if steer.at <= chunk), *later))

    def _poses(self, chunk: int, start: int, count: int) -> tuple[np.ndarray, Walk]:
        first = [np.array(IDENTITY).reshape(4, 4)] if start == 0 else []
        moves = count - len(first)
        steer = next((each for each in reversed(self.steers) if each.at <= chunk), None)
        way = steer.way_from(self.walk.pose) if steer is not None and steer.at == chunk else None
        if way is not None:
            rest, walk = _way_to(self.walk, way, moves)
        elif steer is None and self.poses:
            if len(self.poses) < start + count:
                what, got = f"the camera's path ends before chunk {chunk}", f"{len(self.poses)} poses"
                expected, fix = f"{start + count}: one a frame", "steer the session, or start it with a longer path"
                raise LongtakeError(what, got=got, expected=expected, fix=fix)
            rest = [np.array(pose).reshape(4, 4) for pose in self.poses[start + len(first) : start + count]]
            walk = self.walk.at(rest[-1])
        else:
            rest, walk = [], self.walk
            for frame in range(start + len(first), start + count):
                walk = self._step(walk, steer, frame)
                rest.append(np.array(walk.pose).reshape(4, 4))
        return np.stack([*first, *rest]), walk

    def _step(self, walk: Walk, steer: Steer | None, frame: int) -> Walk:
        if steer is not None and steer.velocity is not None:
            return walk.towards(steer.velocity, self.pace)
        scripted = self.keys[frame - FIRST_FRAME] if steer is None and frame - FIRST_FRAME < len(self.keys) else ""
        return walk.step(steer.keys if steer is not None else scripted, self.pace)

    def as_json(self) -> dict[str, Any]:
        """Read back by `camera_from_json`."""
        return asdict(self)


def camera_from_json(given: Mapping[str, Any]) -> CameraPosition:
    """Read `CameraPosition.as_json` back."""
    return record_from_json(CameraPosition, dict(given))


def frames_of_chunk(preset: Preset, chunk: int) -> tuple[int, int]:
    """Index of the first video frame of a chunk, and how many it has."""
    stride, first = preset.vae.stride[0], preset.first_frame(chunk)
    start = stride * (first - 1) + 1 if first else 0
    return start, stride * preset.frames_of(chunk) - (0 if first else stride - 1)


def _way_to(walk: Walk, wanted: np.ndarray, frames: int) -> tuple[list[np.ndarray], Walk]:
    """Evenly from where the camera is to `wanted`, seen from there: turning about one axis, moving in a line."""
    here = np.array(walk.pose).reshape(4, 4)
    rotation = torch.from_numpy(wanted[:3, :3].copy())
    angle = float(torch.arccos(((rotation.trace() - 1) / 2).clamp(-1, 1)))
    axis = _axis(rotation.numpy(), angle)
    poses = []
    for frame in range(1, frames + 1):
        share, moved = frame / frames, np.eye(4)
        moved[:3, :3] = wanted[:3, :3] if frame == frames else _turned(axis, angle * share)
        moved[:3, 3] = wanted[:3, 3] * share
        poses.append(here @ moved)
    return poses, walk.at(poses[-1])


def _axis(rotation: np.ndarray, angle: float) -> np.ndarray:
    if np.pi - angle > 1e-4:
        skew = np.array(
            [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
        )
        return skew / max(float(np.linalg.norm(skew)), 1e-12)
    column = (rotation + np.eye(3))[:, int(np.argmax(np.diag(rotation)))]
    return np.asarray(column / np.linalg.norm(column))


def _turned(axis: np.ndarray, angle: float) -> np.ndarray:
    x, y, z = axis
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew)


def steer_from(
    at: int, pace: Pace, action: str | None = None, pose: Any = None, velocity: Any = None, target: Any = None
) -> Steer:
    """A checked live change; exactly one of action, pose, velocity and target is given.

    Raises:
        LongtakeError: none or several are given, a key is unknown, or a number is not finite.
    """
    ways = {"action": action, "pose": pose, "velocity": velocity, "target": target}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        what, got = "a camera is steered in one way at a time", " and ".join(given) or "nothing"
        expected, fix = "action, pose, velocity or target", "pass action='w', or action='' to let go"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    if action is not None:
        return Steer(at, keys=checked_keys(action))
    if pose is not None:
        return Steer(at, pose=_matrix(pose))
    if target is not None:
        return Steer(at, target=_matrix(target))
    numbers = np.asarray(velocity, np.float64)
    if numbers.shape != (4,) or not np.isfinite(numbers).all():
        raise LongtakeError(
            "bad velocity",
            got=velocity,
            expected="metres a second forward and right, degrees a second to the right and up",
            fix="pass velocity=(0.4, 0, 0, 0)",
        )
    forward, right, yaw, up = (numbers / pace.fps).tolist()
    return Steer(at, velocity=(forward, right, float(np.radians(yaw)), float(np.radians(up))))


def _matrix(pose: Any) -> Matrix:
    from longtake.runtime.camera_files import poses_from

    return tuple(poses_from(np.asarray(pose, np.float64)[None])[0].flatten().tolist())


def steered(
    camera: CameraPosition | None, at: int, from_chunk: int | None = None, **way: Any
) -> tuple[CameraPosition, int]:
    """A camera with a live change from chunk `at` on, or from a later `from_chunk`; and that chunk.

    way: exactly one of
        action: keys held until the next change, such as "w" or "wd"; "" lets go, and the camera coasts to rest.
        pose: 4x4, seen from where the camera then is; reached in one chunk, where it stays.
        velocity: held likewise: metres a second forward and to the right, degrees a second to the right and up.
        target: 4x4, seen from the video's first frame; reached in one chunk, where it stays.

    Raises:
        LongtakeError: there is no camera, the chunk is made already, or see `steer_from`.
    """
    if camera is None:
        raise LongtakeError(
            "this model has no camera", got="a camera that is steered", expected="a prompt", fix="call change_prompt"
        )
    first = at if from_chunk is None else from_chunk
    if first < at:
        raise LongtakeError(
            "that chunk is made already", got=f"chunk {first}", expected=f"{at} or later", fix="leave from_chunk out"
        )
    return camera.steered(steer_from(first, camera.pace, **way)), first


def steers_from(cameras: Sequence[CameraPosition | None], start: int) -> tuple[Steer, ...]:
    """The live changes that hold in chunk `start` and come after it. cameras: before each chunk, and after the last one."""
    held = [steer for steer in getattr(cameras[start], "steers", ()) if steer.at < start]
    last = len(cameras) - 1
    for chunk, camera in enumerate(cameras[start:], start):
        steers = camera.steers if camera else ()
        held += [steer for steer in steers if steer.at == chunk or (chunk == last and steer.at > chunk)]
    return tuple(held)


def cameras_of(camera: CameraPosition, preset: Preset, chunk: int) -> tuple[tuple[tuple[Tensor, Tensor], ...], Walk]:
    """What a chunk's conditions are told of its cameras; and the walk after them."""
    poses, intrinsics, walk = camera.take(preset, chunk)
    return ((poses, intrinsics),), walk


def require_cuts(can: frozenset[str], wanted: str) -> None:
    """Raise LongtakeError if a model that `can` do these has no cuts."""
    if "cut" not in can:
        what, got = "this model has no cuts", wanted
        expected, fix = "one shot", "write the later prompts under `then`, or start another video"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
