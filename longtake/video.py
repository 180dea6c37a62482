"""mp4 files: written frame by frame as h264, yuv420p; read back from whatever FFmpeg decodes.

Legend: T frames, H, W sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from longtake.errors import LongtakeError
from longtake.files import atomic_path

BT709 = 1  # the code of the colour matrix, primaries and transfer that the files are tagged with
QUALITY = {"crf": "17", "preset": "medium"}
DECODER_ERRORS = (av.FFmpegError, ValueError, IndexError, OSError)


class VideoWriter:
    """Writes an mp4 beside its final name and puts it there on `close`, complete and playable.

    Whoever is interrupted only has to call `close`: the frames written so far are kept. Without frames there is no
    file, and an older file under that name stays.
    """

    def __init__(self, path: Path | str, fps: int) -> None:
        self.path, self.fps, self.frames = Path(path), fps, 0
        self._stack = contextlib.ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self._size = (0, 0)

    def write(self, frames_THWC: np.ndarray) -> None:
        """Append frames, uint8 [T, H, W, 3].

        Raises:
            LongtakeError: not such frames, of another size than the first, or not writable.
        """
        self._check(frames_THWC)
        if self._container is None:
            self._open(*frames_THWC.shape[1:3])
        for pixels in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            frame.pts, frame.time_base = self.frames, Fraction(1, self.fps)
            self._mux(frame)
            self.frames += 1

    def close(self) -> None:
        """Finish the file and put it under its final name. Calling it twice is harmless."""
        if self._container is None:
            return
        container, self._container = self._container, None
        with self._stack, _as_error(self.path, "cannot write"):  # an error inside deletes the unfinished file
            try:
                container.mux(self._stream.encode(None))
            finally:
                container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, height: int, width: int) -> None:
        with _as_error(self.path, "cannot write"), contextlib.ExitStack() as stack:
            partial = stack.enter_context(atomic_path(self.path))
            container = av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"})
            stream = container.add_stream("libx264", rate=self.fps, options=QUALITY)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            self._stack = stack.pop_all()
        self._container, self._stream, self._size = container, stream, (height, width)

    def _mux(self, frame: av.VideoFrame) -> None:
        with _as_error(self.path, "cannot write"):
            self._container.mux(self._stream.encode(frame))

    def _check(self, frames: np.ndarray) -> None:
        shape = tuple(frames.shape)
        if frames.dtype != np.uint8 or frames.ndim != 4 or shape[3] != 3 or shape[1] % 2 or shape[2] % 2:
            raise LongtakeError("cannot write these frames as a video", got=f"{frames.dtype} {shape}",
                                expected="uint8 [T, H, W, 3] with even H and W")  # fmt: skip
        if self._container is not None and shape[1:3] != self._size:
            raise LongtakeError("a video's frames must all have one size", got=shape[1:3], expected=self._size)
        if self._container is None and self.frames:
            raise LongtakeError(f"{self.path} is finished", fix="write it with a new VideoWriter")


def write_video(path: Path | str, frames_THWC: np.ndarray, fps: int) -> None:
    """Write frames, uint8 [T, H, W, 3], as an mp4, atomically."""
    with VideoWriter(path, fps) as writer:
        writer.write(frames_THWC)


def frames_from_video(
    path: Path | str, size_hw: tuple[int, int] | None = None, fps: float | None = None
) -> tuple[np.ndarray, float]:
    """All frames, uint8 [T, H, W, 3], and their rate; resized to `size_hw` and resampled to `fps` where given.

    Resampling takes the nearest frame: number k of the result is number k * rate / fps of the file, rounded.

    Raises:
        LongtakeError: missing, not a video, without frames, or broken in the middle.
    """
    source = Path(path)
    with _opened(source) as (_, stream):
        rate = _rate(source, stream)
    return np.stack(list(frames_one_by_one(source, size_hw, fps))), fps or rate


def frames_one_by_one(
    path: Path | str, size_hw: tuple[int, int] | None = None, fps: float | None = None
) -> Iterator[np.ndarray]:
    """The frames of `frames_from_video`, uint8 [H, W, 3], as they are decoded. Raises what that does."""
    source, count = Path(path), 0
    with _opened(source) as (container, stream):
        step = _rate(source, stream) / fps if fps else 1.0
        for number, frame in enumerate(container.decode(stream)):
            pixels: np.ndarray | None = None
            while int(count * step + 0.5) <= number:
                pixels = _pixels(frame, size_hw) if pixels is None else pixels
                yield pixels
                count += 1
    if not count:
        raise _empty(source)


def probe_video(path: Path | str) -> tuple[int, float]:
    """Number of frames and their rate, found without decoding more than the first one.

    Raises:
        LongtakeError: missing, not a video, or without frames.
    """
    source = Path(path)
    with _opened(source) as (container, stream):
        rate, frames = _rate(source, stream), stream.frames
        if next(container.decode(stream), None) is None:
            raise _empty(source)
        if not frames:  # some formats don't say
            container.seek(0)
            frames = sum(packet.size > 0 for packet in container.demux(stream))
    return frames, rate


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An input container and its first video stream."""
    if not path.is_file():
        raise LongtakeError(f"{path} does not exist" if not path.exists() else f"{path} is not a file",
                            got="a folder" if path.is_dir() else "nothing there", expected="a video file",
                            fix="check the path")  # fmt: skip
    if not path.stat().st_size:
        raise LongtakeError(f"{path} is empty", got="0 bytes", expected="a video file", fix="write it again")
    with _as_error(path, "cannot read"), av.open(str(path)) as container:
        if not container.streams.video:
            kinds = " and ".join(sorted({stream.type for stream in container.streams}))
            got = f"{kinds} only" if kinds else "no streams"
            raise LongtakeError(f"{path} has no picture", got=got, expected="a video stream",
                                fix="choose another file")  # fmt: skip
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


@contextlib.contextmanager
def _as_error(path: Path, what: str) -> Iterator[None]:
    """Turn FFmpeg's and the system's errors into one a user can act on."""
    try:
        yield
    except DECODER_ERRORS as error:
        reading = what == "cannot read"
        raise LongtakeError(
            f"{what} {path}", got=str(error) or repr(error), expected="a playable video" if reading else None,
            fix="make or fetch the file again" if reading else "check the folder's permissions and the free space",
        ) from error  # fmt: skip


def _rate(path: Path, stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise LongtakeError(f"{path} does not say its frame rate", expected="a video with a constant frame rate",
                            fix="convert it to mp4")  # fmt: skip
    return float(rate)


def _pixels(frame: av.VideoFrame, size_hw: tuple[int, int] | None) -> np.ndarray:
    """One frame as uint8 [H, W, 3]; sizes are changed by averaging, which does not alias."""
    height, width = size_hw or (frame.height, frame.width)
    return frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=Interpolation.AREA)


def _empty(path: Path) -> LongtakeError:
    return LongtakeError(f"{path} has no frames", got="0 frames", expected="at least 1", fix="choose another file")
