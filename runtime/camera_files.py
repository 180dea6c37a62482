"""Poses and intrinsics that a user brings: read and checked.

Legend: N frames; poses are camera to world, OpenCV axes (x right, y down, z forward); intrinsics fx, fy, cx, cy in pixels of
the picture.
"""

from __future__ import annotations

import math
import tokenize
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from longtake.errors import LongtakeError

ORTHOGONAL = 1e-3  # how far a rotation may be from one
FIELD = (10.0, 150.0)  # degrees that a camera may see, across and down
DEFAULT_FIELD = 60.0  # degrees across, where nothing is said
# What NumPy raises for a header that it cannot read; the last two come of a count that is none.
UNREADABLE = (ValueError, OSError, EOFError, SyntaxError, tokenize.TokenError, RecursionError, OverflowError, TypeError)

Numbers = Path | str | np.ndarray


def numbers_of(given: Numbers, what: str) -> np.ndarray:
    """An array, or that of a .npy file, as float64. Raises LongtakeError for a file that holds none."""
    if isinstance(given, (str, Path)):
        path = Path(given)
        if not path.is_file():
            raise LongtakeError(f"{what} {path} does not exist", expected="a .npy file", fix="check the path")
        try:
            given = open_memmap(path, mode="r")  # no pickle, no zip; no more is taken than the file holds
        except UNREADABLE as error:
            got = str(error).splitlines()[0][:120]
            raise LongtakeError(
                f"cannot read {what} {path}", got=got, expected="a .npy file of numbers", fix="write it with numpy.save"
            ) from None
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "fiu":
        got = getattr(given, "dtype", type(given).__name__)
        raise LongtakeError(
            f"{what} are no numbers", got=got, expected="an array of floats", fix="write it with numpy.save"
        )
    return given.astype(np.float64)


def poses_from(given: Numbers) -> np.ndarray:
    """Poses float64 [N, 4, 4], as they are: not yet relative to the first.

    Raises:
        LongtakeError: another shape, not finite, or no rigid motions; says which frame.
    """
    poses = numbers_of(given, "the camera poses")
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise LongtakeError(
            "these are no camera poses", got=poses.shape, expected="(frames, 4, 4)", fix="pass camera-to-world matrices"
        )
    finite = np.isfinite(poses).all((1, 2))
    if not finite.all():
        frame = int(np.argmin(finite))
        what, got = f"the pose of frame {frame} is not finite", poses[frame].tolist()
        expected, fix = "numbers", "mend the file"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    rotation = poses[:, :3, :3]
    with np.errstate(all="ignore"):  # huge numbers have products that are none
        wrong = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
        wrong = np.maximum(wrong, np.abs(poses[:, 3] - [0, 0, 0, 1]).max(1))
        wrong = np.where(np.linalg.det(rotation) < 0, 2.0, wrong)
    if not wrong.max() <= ORTHOGONAL:
        frame = int(np.argmin(wrong <= ORTHOGONAL))
        raise LongtakeError(
            f"the pose of frame {frame} is no rigid motion",
            got=f"{wrong[frame]:.3g} from one",
            expected=f"an orthogonal 3x3 part of determinant 1 and a last row 0 0 0 1, to {ORTHOGONAL:g}",
            fix="pass camera-to-world matrices without scale",
        )
    return poses


def intrinsics_from(given: Numbers, height: int, width: int) -> np.ndarray:
    """Intrinsics float64 [4] or [N, 4] of a picture of that size, from (4,), (3, 3), (N, 4) or (N, 3, 3).

    Raises:
        LongtakeError: another shape, or a camera that cannot be.
    """
    values = numbers_of(given, "the intrinsics")
    if values.shape[-2:] == (3, 3) and values.ndim in (2, 3):
        values = np.stack([values[..., i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))], -1)
    if values.ndim not in (1, 2) or values.shape[-1] != 4 or not len(values):
        what, got = "these are no intrinsics", values.shape
        expected, fix = "(4,), (3, 3), (frames, 4) or (frames, 3, 3)", "pass fx, fy, cx, cy"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    rows = values.reshape(-1, 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        fields = np.degrees(2 * np.arctan(np.array([width, height]) / 2 / rows[:, :2]))
    inside = (rows[:, 2] >= 0) & (rows[:, 2] <= width) & (rows[:, 3] >= 0) & (rows[:, 3] <= height)
    good = np.isfinite(rows).all(1) & (rows[:, :2] > 0).all(1) & inside
    good &= ((fields >= FIELD[0]) & (fields <= FIELD[1])).all(1)
    if not good.all():
        row = rows[int(np.argmin(good))]
        raise LongtakeError(
            "these intrinsics are of no camera of this picture",
            got=f"fx {row[0]:g}, fy {row[1]:g}, cx {row[2]:g}, cy {row[3]:g} of {width}x{height} pixels",
            expected=f"fields of view of {FIELD[0]:g} to {FIELD[1]:g} degrees, a centre inside the picture",
            fix="give them in pixels of the picture, or leave them out for 60 degrees",
        )
    return values


def default_intrinsics(height: int, width: int) -> np.ndarray:
    """A camera in the middle that sees DEFAULT_FIELD degrees across."""
    focal = width / 2 / math.tan(math.radians(DEFAULT_FIELD / 2))
    return np.array([focal, focal, width / 2, height / 2])


def of_frames(intrinsics: np.ndarray, frames: int) -> np.ndarray:
    """Intrinsics of every frame, [frames, 4]: fewer are stretched linearly over time, more are cut."""
    if intrinsics.ndim == 1:
        return np.broadcast_to(intrinsics, (frames, 4))
    if len(intrinsics) >= frames:
        return intrinsics[:frames]
    at = np.linspace(0, len(intrinsics) - 1, frames)
    return np.stack([np.interp(at, np.arange(len(intrinsics)), column) for column in intrinsics.T], -1)
