"""What a video of a model with cameras starts from: a picture, and where its camera goes.

Legend: N frames.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from longtake.errors import LongtakeError
from longtake.image_cover import cover_of
from longtake.runtime.camera import CameraPosition
from longtake.runtime.camera_files import (
    DEFAULT_FIELD,
    Numbers,
    default_intrinsics,
    intrinsics_from,
    numbers_of,
    of_frames,
    poses_from,
)
from longtake.training.models.camera_poses import relative_poses
from longtake.training.models.presets import SHIPPED, Preset
from longtake.training.models.sana_wm.actions import Pace, keys_of_frames


@dataclass(frozen=True)
class View:
    """Where a camera goes; what is None is as the story says.

    action: keys and frames, such as "w-24, wd-12". camera: poses of every frame, [N, 4, 4], camera to world, OpenCV axes, or a
    .npy file of them. intrinsics: fx, fy, cx, cy of the given picture's pixels, one or one a frame, or a .npy file. speed,
    turn: metres and degrees that keys move the camera in a frame.
    """

    action: str | None = None
    camera: Numbers | None = None
    intrinsics: Numbers | None = None
    speed: float | None = None
    turn: float | None = None

    @property
    def given(self) -> list[str]:
        """The names of what is given."""
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]

    @property
    def told(self) -> dict[str, Any]:
        """What a report says of it: files by their path, tables by their shape, and what stands for what is not given."""
        kept = {name: _told(getattr(self, name)) for name in self.given}
        path = {} if "action" in kept or "camera" in kept else {"action": "none: at rest"}
        return {**path, **kept, **({} if "intrinsics" in kept else {"intrinsics": f"{DEFAULT_FIELD:g} degrees across"})}

    def over(self, story: View) -> View:
        """This, and what it leaves open as `story` says; a path of one takes the place of either path of the other."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        paths = ("action", "camera") if self.action is not None or self.camera is not None else ()
        rest = {name: getattr(story, name) for name in story.given if own[name] is None and name not in paths}
        return View(**{**own, **rest})

    def check(self, can: frozenset[str], preset: Preset) -> None:
        """Raise LongtakeError where it is given to a model without cameras, or twice, or cannot be read."""
        if self.given and "camera" not in can:
            what, got = f"preset {preset.name} has no camera", ", ".join(self.given)
            expected, fix = "a prompt", "leave it out, or take a preset of family sana_wm"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
        if self.action is not None and self.camera is not None:
            raise LongtakeError(
                "a camera has one path", got="action and camera", expected="one of the two", fix="leave one out"
            )

    def check_values(self) -> None:
        """Raise LongtakeError for keys, numbers and files that are none, as far as that is known without a model."""
        if self.speed is not None or self.turn is not None:
            self._pace(Pace.fps)
        if self.action is not None:
            keys_of_frames(self.action)
        if self.camera is not None:
            poses_from(self.camera)
        if self.intrinsics is not None:
            numbers_of(self.intrinsics, "the intrinsics")

    def _pace(self, fps: float) -> Pace:
        return Pace(
            Pace.speed if self.speed is None else self.speed, Pace.turn if self.turn is None else self.turn, fps
        )

    def position(self, preset: Preset, picture_hw: tuple[int, int], frames: int) -> CameraPosition:
        """The camera of a video of `frames` frames that starts from a picture of that size.

        Raises:
            LongtakeError: a path ends before the video, or something is no camera, no action or no intrinsics.
        """
        pace = self._pace(float(preset.fps))
        keys = () if self.action is None else keys_of_frames(self.action)
        poses = () if self.camera is None else _path(self.camera, frames)
        return CameraPosition(self._intrinsics(preset, picture_hw, frames), pace, keys=keys, poses=poses)

    def _intrinsics(self, preset: Preset, picture_hw: tuple[int, int], frames: int) -> Any:
        size = preset.height, preset.width
        if self.intrinsics is None:
            values = default_intrinsics(*size)
        else:
            cover, _ = cover_of(picture_hw, *size)
            values = cover.intrinsics(intrinsics_from(self.intrinsics, *picture_hw))
        grid = preset.latent_hw
        values = values * np.array([grid[1] / size[1], grid[0] / size[0]] * 2)
        rows = values[None] if values.ndim == 1 else of_frames(values, frames)
        return tuple(tuple(row) for row in rows.tolist())


def _told(value: Any) -> Any:
    if isinstance(value, (str, int, float)):
        return value
    return str(value) if isinstance(value, Path) else f"given, {'x'.join(map(str, np.shape(value)))}"


def _path(camera: Numbers, frames: int) -> tuple[tuple[float, ...], ...]:
    poses = poses_from(camera)
    if len(poses) < frames:
        what, got = "the camera's path ends before the video", f"{len(poses)} poses"
        expected, fix = f"{frames}: one a frame", "generate fewer chunks, or pass a longer path"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return tuple(tuple(pose) for pose in relative_poses(poses).reshape(len(poses), 16).tolist())


def require_picture(clip: str) -> None:
    """Raise LongtakeError: a clip's frames have cameras, too, and nobody knows them."""
    what, got = "a model with cameras does not go on from a clip", f"clip {clip}, whose cameras are not known"
    expected, fix = "a picture", "pass --image FILE, or go on with a saved session: --load-session FILE"
    raise LongtakeError(what, got=got, expected=expected, fix=fix)


def own_picture(preset: Preset) -> Path:
    """The picture that is shipped with a preset, for videos that are given none.

    Raises:
        LongtakeError: there is none.
    """
    path = SHIPPED / f"{preset.name}.png"
    if not path.is_file():
        what, got = f"a video of preset {preset.name} starts from a picture", "none"
        expected, fix = "a picture file", "pass --image FILE"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return path
