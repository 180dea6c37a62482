"""How players turn a video's frames: its display matrix, which phones write instead of turning the picture.

Legend: H, W sizes.
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type

from longtake.errors import LongtakeError

Matrix = tuple[int, int, int, int]  # where the coded x and y axes point on the screen: (xx, xy, yx, yy), y downwards
UPRIGHT: Matrix = (1, 0, 0, 1)
SLANT = 0.02  # share of the main direction that counts as none


def display_matrix(frame: av.VideoFrame) -> Matrix:
    """The frame's turn and flip, one of eight.

    Raises:
        LongtakeError: it is turned by anything but quarters.
    """
    data: Any = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    if data is None:
        return UPRIGHT
    numbers = np.frombuffer(bytes(data), np.int32)[:5] / 65536
    xx, xy, yx, yy = (float(numbers[place]) for place in (0, 1, 3, 4))
    most = max(abs(xx), abs(xy), abs(yx), abs(yy))
    if not most:
        return UPRIGHT
    signs = [0 if abs(value) < SLANT * most else 1 if value > 0 else -1 for value in (xx, xy, yx, yy)]
    if sorted(map(abs, signs)) != [0, 0, 1, 1] or abs(signs[0]) != abs(signs[3]):
        what, got = "the video is turned by an odd angle", f"display matrix {[xx, xy, yx, yy]}"
        expected, fix = "quarter turns and flips", "convert it, which turns it upright"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return signs[0], signs[1], signs[2], signs[3]


def sideways(matrix: Matrix) -> bool:
    """Whether width and height change places."""
    return matrix[0] == 0


def as_shown(pixels_HWC: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Coded pixels as they are to be seen."""
    if matrix == UPRIGHT:
        return pixels_HWC
    xx, xy, yx, yy = matrix
    if sideways(matrix):  # the coded x axis runs along the screen's y
        pixels_HWC, xx, yy = pixels_HWC.swapaxes(0, 1), yx, xy
    return np.ascontiguousarray(pixels_HWC[::yy, ::xx])
