"""mp4 files: written frame by frame as h264, yuv420p; read back, as a player shows them, from whatever FFmpeg decodes.

Legend: T frames, H, W sizes.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation

from longtake.errors import LongtakeError
from longtake.files import atomic_path
from longtake.out_of_memory import is_out_of_memory, out_of_memory
from longtake.tar_files import opened_member
from longtake.video_display import as_shown, display_matrix, sideways

BT709 = 1  # the code of the colour matrix, primaries and transfer that the files are tagged with
QUALITY = {"crf": "17", "preset": "medium"}
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")  # of the video files that are looked for in folders, in any case
LONGEST_STILL = 600  # seconds between two frames; more is no pause but a broken clock
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
        self._broken = False

    def write(self, frames_THWC: np.ndarray) -> None:
        """Append frames, uint8 [T, H, W, 3].

        Raises:
            LongtakeError: not such frames, of another size than the first, or not writable.
        """
        self._check(frames_THWC)
        if self._broken:
            raise LongtakeError(
                f"{self.path} could not be written and is given up", fix="write it with a new VideoWriter"
            )
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
        try:
            with as_error(self.path, "cannot write"):
                self._container.mux(self._stream.encode(None))
                self._container.close()
        except BaseException as error:
            self._give_up(error)
            raise
        self._container = None
        self._stack.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, height: int, width: int) -> None:
        with as_error(self.path, "cannot write"), contextlib.ExitStack() as stack:
            self._partial = stack.enter_context(atomic_path(self.path))
            container = av.open(_url(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
            container.metadata["comment"] = "made with longtake"  # by which `outputs` knows our own files
            stream = container.add_stream("libx264", rate=self.fps, options=QUALITY)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            self._stack = stack.pop_all()
        self._container, self._stream, self._size = container, stream, (height, width)

    def _mux(self, frame: av.VideoFrame) -> None:
        try:
            with as_error(self.path, "cannot write"):
                self._container.mux(self._stream.encode(frame))
        except LongtakeError as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Delete the unfinished file, of which the muxer has failed to write a part.

        FFmpeg's muxer is not called again, not even by a finalizer: what it does with a header or a packet that is half
        written is not defined, and crashes. It still has the file open, so the space is given back first.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._container))
        self._container, self._broken = None, True
        with contextlib.suppress(OSError):
            os.truncate(self._partial, 0)
        self._stack.pop_all().__exit__(type(error), error, error.__traceback__)

    def _check(self, frames: np.ndarray) -> None:
        shape = tuple(frames.shape)
        if frames.dtype != np.uint8 or frames.ndim != 4 or shape[3] != 3 or shape[1] % 2 or shape[2] % 2:
            what = "cannot write these frames as a video"
            raise LongtakeError(what, got=f"{frames.dtype} {shape}", expected="uint8 [T, H, W, 3] with even H and W")
        if self._container is not None and shape[1:3] != self._size:
            raise LongtakeError("a video's frames must all have one size", got=shape[1:3], expected=self._size)
        if self._container is None and self.frames:
            raise LongtakeError(f"{self.path} is finished", fix="write it with a new VideoWriter")


def write_video(path: Path | str, frames_THWC: np.ndarray, fps: int) -> None:
    """Write frames, uint8 [T, H, W, 3], as an mp4, atomically."""
    with VideoWriter(path, fps) as writer:
        writer.write(frames_THWC)


def frames_one_by_one(
    path: Path | str, size_hw: tuple[int, int] | None = None, fps: float | None = None
) -> Iterator[np.ndarray]:
    """All frames, uint8 [H, W, 3], as they are decoded; resized to `size_hw` and resampled to `fps` where given.

    Frames stand upright, as players show them. Resampling goes by time stamps: number k of the result is the frame that
    is to be seen at k / fps seconds, or the next one if that is nearer than half a frame.

    Raises:
        LongtakeError: missing, not a video, without frames, or broken in the middle.
    """
    source, count = Path(path), 0
    with opened(source) as (container, stream):
        for frame, begin, end in shown(source, stream, container.decode(stream), fps):
            if end > begin:
                pixels = pixels_of(frame, size_hw)
                for _ in range(begin, end):
                    yield pixels
            count += 1
    if not count:
        raise no_frames(source)


def count_frames(path: Path | str, fps: float) -> int:
    """How many frames `frames_one_by_one` gives at `fps`, found without decoding.

    Raises:
        LongtakeError: missing, not a video, or without frames.
    """
    source = Path(path)
    with opened(source) as (container, stream):
        rate = rate_of(source, stream)
        half = half_frame(stream, rate)
        seconds = seconds_of(container, stream, rate, half)
    if not seconds:
        raise no_frames(source)
    return moments_before(seconds - half, fps)


def seconds_of(container: Any, stream: Any, rate: Fraction, half: Fraction) -> Fraction | None:
    """How long a film is, found without decoding; None if it has no frames."""
    seconds = stream.duration * stream.time_base if stream.duration else None
    if not (stream.frames and stream.base_rate == rate and seconds == stream.frames / rate):  # not a constant rate
        last = _last(container, stream, rate)
        seconds = last and _end(stream, *last, half)
    return seconds


def probe_video(path: Path | str) -> tuple[int, float]:
    """Number of frames and their rate, found without decoding more than the first one.

    Raises:
        LongtakeError: missing, not a video, or without frames.
    """
    source = Path(path)
    with opened(source) as (container, stream):
        rate, frames = float(rate_of(source, stream)), stream.frames
        if next(container.decode(stream), None) is None:
            raise no_frames(source)
        if not frames:  # some formats don't say
            container.seek(0)
            frames = sum(packet.size > 0 for packet in container.demux(stream))
    return frames, rate


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An input container and its first video stream that is no cover picture."""
    member = opened_member(path)
    if member is None and not path.is_file():
        what = f"{path} does not exist" if not path.exists() else f"{path} is not a file"
        expected, fix = "a video file", "check the path"
        raise LongtakeError(what, got="a folder" if path.is_dir() else "nothing there", expected=expected, fix=fix)
    if member is None and not path.stat().st_size:
        raise LongtakeError(f"{path} is empty", got="0 bytes", expected="a video file", fix="write it again")
    with member or contextlib.nullcontext(), as_error(path, "cannot read"), av.open(member or _url(path)) as container:
        films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not films:
            kinds = " and ".join(sorted({_kind(stream) for stream in container.streams}))
            got = f"{kinds} only" if kinds else "no streams"
            raise LongtakeError(f"{path} has no picture", got=got, expected="a video stream", fix="choose another file")
        stream = films[0]
        stream.thread_type = "AUTO"
        yield container, stream


@contextlib.contextmanager
def as_error(path: Path, what: str) -> Iterator[None]:
    """Turn FFmpeg's and the system's errors into one a user can act on."""
    try:
        yield
    except DECODER_ERRORS as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, f"at {path}") from error
        reading = what == "cannot read"
        fix = "make or fetch the file again" if reading else "check the folder's permissions and the free space"
        got, expected = str(error) or repr(error), "a playable video" if reading else None
        raise LongtakeError(f"{what} {path}", got=got, expected=expected, fix=fix) from error


def _url(path: Path) -> str:
    """A path for FFmpeg, which takes what stands before a colon for a protocol."""
    return f"file:{path}"


def _kind(stream: Any) -> str:
    return "cover picture" if stream.type == "video" else str(stream.type)


def rate_of(path: Path, stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        what = f"{path} does not say its frame rate"
        raise LongtakeError(what, expected="a video with a constant frame rate", fix="convert it to mp4")
    return Fraction(rate)


def half_frame(stream: Any, rate: Fraction) -> Fraction:
    """Half the time between two frames where they come fastest: so much earlier than its time a frame is taken."""
    return 1 / (2 * max(rate, Fraction(stream.base_rate or 0)))


def moments_before(seconds: Fraction, fps: float) -> int:
    """How many of the moments k / fps, k = 0, 1, ... lie before `seconds`; at least the first."""
    return max(1, math.ceil(seconds * Fraction(fps)))


def shown(
    path: Path, stream: Any, frames: Iterable[Any], fps: float | None, first: Fraction | None = None
) -> Iterator[tuple[av.VideoFrame, int, int]]:
    """Each frame, with the numbers at `fps` that it is shown from and up to; its own number and the next if that is None.

    first: time of the film's first frame, where `frames` begin after it.
    """
    if fps is None:
        yield from ((frame, number, number + 1) for number, frame in enumerate(frames))
        return
    rate = rate_of(path, stream)
    half, count = half_frame(stream, rate), 0
    last: av.VideoFrame | None = None
    time = due = Fraction(0)  # due: when the next frame comes if it has no stamp
    origin = first or Fraction(0)
    for frame in frames:
        stamp = None if frame.pts is None else frame.pts * frame.time_base
        if last is None and first is None:
            origin = stamp or origin
        before, time = time, due if stamp is None else max(time, stamp - origin)
        if last is None and time:
            before, count = time, moments_before(time - half, fps)
        if time - before > LONGEST_STILL:
            what, got = f"{path} stands still for too long", f"{float(time - before):.0f} s without a new frame"
            expected, fix = f"at most {LONGEST_STILL} s", "cut the pause out, or convert it to mp4"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
        if last is not None:
            until = max(count, moments_before(time - half, fps))
            yield last, count, until
            count = until
        last, due = frame, time + (frame.duration * frame.time_base if frame.duration else 1 / rate)
    if last is not None:
        yield last, count, max(count, moments_before(_end(stream, time, due, half) - half, fps))


def _end(stream: Any, last: Fraction, end: Fraction, half: Fraction) -> Fraction:
    """When the last frame ends, which begins at `last` and says that it ends at `end`.

    Where frames are stored in another order than they are shown in, a frame's duration may be another one's, but the
    sum of all holds. All times are from the first frame's on.
    """
    whole = stream.duration * stream.time_base if stream.duration else end
    return min(end, max(last + 2 * half, whole), last + LONGEST_STILL)


def _last(container: Any, stream: Any, rate: Fraction) -> tuple[Fraction, Fraction] | None:
    """When the frame shown last begins and ends, from the first one's time on, by the packets' stamps; None without."""
    begins: dict[Fraction, Fraction] = {}
    due = Fraction(0)
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            begin = due if packet.pts is None else packet.pts * stream.time_base
            due = begins[begin] = begin + (packet.duration * stream.time_base if packet.duration else 1 / rate)
    return (max(begins) - min(begins), begins[max(begins)] - min(begins)) if begins else None


def pixels_of(frame: av.VideoFrame, size_hw: tuple[int, int] | None) -> np.ndarray:
    """One frame as uint8 [H, W, 3], upright; sizes are changed by averaging, which does not alias."""
    matrix = display_matrix(frame)
    height, width = (frame.height, frame.width) if size_hw is None else size_hw[:: -1 if sideways(matrix) else 1]
    return as_shown(
        frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=Interpolation.AREA), matrix
    )


def no_frames(path: Path) -> LongtakeError:
    return LongtakeError(f"{path} has no frames", got="0 frames", expected="at least 1", fix="choose another file")
