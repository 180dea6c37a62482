"""Some frames from the middle of a film: found by seeking, brought to one size as they are decoded.

Legend: T frames, H, W sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from longtake.errors import LongtakeError
from longtake.video import half_frame, moments_before, no_frames, opened, rate_of, seconds_of, shown
from longtake.video_display import as_shown, display_matrix, sideways

FITS = ("crop", "pad", "stretch")
EARLIER = (0, 1, 4, 16)  # seconds before the first frame that a keyframe is sought at, one after the other
NEAR = 2  # seconds from the start to which it is decoded from there


@dataclass(frozen=True)
class Look:
    """What can be said of a film without decoding it: frames at a rate, seconds, size as shown, its own rate."""

    frames: int
    height: int
    width: int
    rate: float


def look_at(path: Path, fps: float) -> Look:
    """Size, rate and number of frames at `fps`. Raises what `count_frames` does."""
    with opened(path) as (container, stream):
        rate = rate_of(path, stream)
        half = half_frame(stream, rate)
        seconds = seconds_of(container, stream, rate, half)
        if not seconds:
            raise no_frames(path)
        height, width = stream.codec_context.height, stream.codec_context.width
    return Look(moments_before(seconds - half, fps), height, width, float(rate))


@dataclass(frozen=True)
class Wanted:
    """Frames start..start+count at `fps`, of one size; fit: see `frames_between`."""

    start: int
    count: int
    size_hw: tuple[int, int]
    fps: float
    fit: str


def frames_between(
    path: Path, start: int, count: int, size_hw: tuple[int, int], fps: float, fit: str = "stretch"
) -> np.ndarray:
    """Frames start..start+count of what `video.frames_one_by_one` gives at `fps`, uint8 [T, H, W, 3]; fewer at the end.

    Only the frames from the last keyframe before on are decoded, and only those asked for are kept.

    fit: crop the middle of what is too wide or too high, pad with black, or stretch.

    Raises:
        LongtakeError: missing, not a video, or broken there.
    """
    wanted = Wanted(start, count, size_hw, fps, fit)
    if start / fps > NEAR:
        for earlier in EARLIER:
            if (taken := _sought(path, wanted, earlier)) is not None:
                return taken
    with opened(path) as (container, stream):
        return _taken(path, stream, container.decode(stream), None, wanted)


def _sought(path: Path, wanted: Wanted, earlier: int) -> np.ndarray | None:
    """The frames from a keyframe on; None if none was found that is early enough."""
    with opened(path) as (container, stream):
        begin = next(container.decode(stream), None)
        if begin is None or begin.pts is None:
            return None
        first = begin.pts * begin.time_base
        target = first + Fraction(wanted.start) / Fraction(wanted.fps) - earlier
        if target <= first:
            return None
        half = half_frame(stream, rate_of(path, stream))
        try:
            container.seek(math.floor(target / stream.time_base), stream=stream, backward=True)
            frames = container.decode(stream)
            frame = next((frame for frame in frames if frame.key_frame and frame.pts is not None), None)
        except (
            av.FFmpegError
        ):  # a film that cannot be sought in; what is broken shows when it is decoded from the start
            return None
        if frame is None or moments_before(frame.pts * frame.time_base - first - half, wanted.fps) > wanted.start:
            return None
        return _taken(path, stream, chain([frame], frames), first, wanted)


def _taken(
    path: Path, stream: Any, frames: Iterable[av.VideoFrame], first: Fraction | None, wanted: Wanted
) -> np.ndarray:
    taken = list(islice(_fitted(path, stream, frames, first, wanted), wanted.count))
    if not taken and not wanted.start:
        raise no_frames(path)
    return np.stack(taken) if taken else np.zeros((0, *wanted.size_hw, 3), np.uint8)


def _fitted(
    path: Path, stream: Any, frames: Iterable[av.VideoFrame], first: Fraction | None, wanted: Wanted
) -> Iterator[np.ndarray]:
    shape = Fraction(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    start, stop = wanted.start, wanted.start + wanted.count
    for frame, begin, end in shown(path, stream, frames, wanted.fps, first):
        if min(end, stop) > max(begin, start):
            pixels = fitted_pixels(frame, wanted.size_hw, wanted.fit, shape)
            for _ in range(max(begin, start), min(end, stop)):
                yield pixels


def fitted_pixels(frame: av.VideoFrame, size_hw: tuple[int, int], fit: str, shape: Fraction) -> np.ndarray:
    """One frame as uint8 [H, W, 3], upright, of one size; `shape`: how wide a coded pixel is for its height.

    Raises:
        LongtakeError: there is no such fit.
    """
    if fit not in FITS:
        raise LongtakeError("bad --fit", got=fit, expected=" | ".join(FITS), fix="--fit crop")
    matrix = display_matrix(frame)
    height, width = size_hw[:: -1 if sideways(matrix) else 1]
    down, across = Fraction(height, frame.height), Fraction(width) / (frame.width * (shape or 1))
    if fit != "stretch":
        down = across = max(down, across) if fit == "crop" else min(down, across)
    rows, columns = max(1, round(frame.height * down)), max(1, round(frame.width * (shape or 1) * across))
    if fit == "stretch":
        rows, columns = height, width
    pixels = frame.to_ndarray(format="rgb24", width=columns, height=rows, interpolation=Interpolation.AREA)
    return as_shown(_placed(pixels, height, width), matrix)


def _placed(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of what is larger, on black where it is smaller."""
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    top, left = max(0, rows - height) // 2, max(0, columns - width) // 2
    pixels = pixels[top : top + height, left : left + width]
    placed = np.zeros((height, width, 3), np.uint8)
    above, before = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
    placed[above : above + pixels.shape[0], before : before + pixels.shape[1]] = pixels
    return placed
