"""One chunk, one self-contained piece of fragmented MP4: what is streamed, kept and put together to a film.

A fragment is a function of (frames, number of its first frame, its own number, encoder settings) alone: a fresh encoder and
muxer a chunk, one closed group of pictures. So nothing waits for the next chunk, and a resumed session goes on byte for byte.

Legend: T frames, H, W sizes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace

from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.files import atomic_path

BT709 = 1  # the code of the colour matrix, primaries and transfer that the stream is tagged with
os.environ.setdefault("SVT_LOG", "1")  # else the AV1 encoder prints its settings for every fragment
LARGE = 640 * 480  # pixels; two threads keep up below
ENDLESS = 100_000  # frames between two key frames: a fragment has one, its first
ENCODERS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {  # the first that opens is taken
    "h264": (
        ("h264_nvenc", {"preset": "p4", "rc": "constqp", "qp": "23", "bf": "0"}),
        ("libx264", {"preset": "veryfast", "crf": "20", "bf": "0", "sc_threshold": "0"}),
    ),
    "vp9": (("libvpx-vp9", {"deadline": "realtime", "cpu-used": "6", "crf": "30", "b": "0", "lag-in-frames": "0"}),),
    "av1": (("libsvtav1", {"preset": "10", "crf": "35", "svtav1-params": "lp=1:pred-struct=1"}),),
}
CODECS = tuple(ENCODERS)
MUXER = {
    "movflags": "empty_moov+default_base_moof+frag_keyframe+frag_discont+skip_trailer",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",  # without it every fragment would start at 0
}


@dataclass(frozen=True)
class Codec:
    """How chunks are encoded. name: one of CODECS. encoder: FFmpeg's name of what writes it."""

    name: str
    encoder: str
    width: int
    height: int
    fps: int

    def __post_init__(self) -> None:
        """Raise LongtakeError for a codec that there is not."""
        if self.name not in CODECS:
            raise LongtakeError("unknown codec", got=self.name, expected=" | ".join(CODECS), fix="leave codec out")

    @property
    def threads(self) -> int:
        """Of the encoder. What it writes depends on how many it has, so it is a matter of the size, not of the machine."""
        return 8 if self.width * self.height > LARGE else 2

    @property
    def options(self) -> dict[str, str]:
        return dict(next(options for encoder, options in ENCODERS[self.name] if encoder == self.encoder))


@dataclass(frozen=True)
class Fragment:
    """init: ftyp and moov, the same of all fragments of a stream. media: one moof and mdat. mime: with codecs."""

    init: bytes
    media: bytes
    mime: str
    encoder: str = field(default="")


def codec_for(name: str, width: int, height: int, fps: int, encoder: str | None = None) -> Codec:
    """The codec by name with the first encoder that opens here, or with `encoder`.

    Raises:
        LongtakeError: there is no such codec.
        UnavailableError: nothing here writes it.
    """
    if name not in ENCODERS:
        raise LongtakeError("unknown codec", got=name, expected=" | ".join(CODECS), fix="leave codec out")
    for candidate, _ in ENCODERS[name]:
        if encoder in (None, candidate) and opens(candidate):
            return Codec(name, candidate, width, height, fps)
    wanted = encoder or " or ".join(candidate for candidate, _ in ENCODERS[name])
    raise UnavailableError(f"nothing here writes {name}", expected=wanted, fix="choose another --codec")


@cache
def opens(encoder: str) -> bool:
    """Whether an encoder works here, found by using it."""
    name = next(codec for codec, known in ENCODERS.items() if encoder in dict(known))
    try:
        fragment(np.zeros((1, 256, 256, 3), np.uint8), 0, 0, Codec(name, encoder, 256, 256, 24))
    except (av.FFmpegError, ValueError, OSError, LongtakeError):
        return False
    return True


def fragment(frames_THWC: np.ndarray, first_frame: int, number: int, codec: Codec) -> Fragment:
    """Encode frames, uint8 [T, H, W, 3], as fragment `number` of a stream, shown from frame `first_frame` on.

    Raises:
        LongtakeError: the frames are not of the codec's size, or there are none.
    """
    wanted = (codec.height, codec.width, 3)
    if not len(frames_THWC) or frames_THWC.shape[1:] != wanted or frames_THWC.dtype != np.uint8:
        got = f"{frames_THWC.dtype} {frames_THWC.shape}"
        raise LongtakeError("these frames do not fit the stream", got=got, expected=f"uint8 [T, {wanted}]")
    data = _muxed(frames_THWC, first_frame, number, codec)
    split = _start_of(data, b"moof")
    init = data[:split]
    return Fragment(init, data[split:], f'video/mp4; codecs="{codecs_of(init)}"', codec.encoder)


def _muxed(frames: np.ndarray, first_frame: int, number: int, codec: Codec) -> bytes:
    out, tick = io.BytesIO(), Fraction(1, codec.fps)
    scale = {"fragment_index": str(number + 1), "video_track_timescale": str(512 * codec.fps)}
    with av.open(out, "w", format="mp4", options={**MUXER, **scale}) as container:
        stream: Any = container.add_stream(codec.encoder, rate=codec.fps, options=codec.options)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = codec.width, codec.height, "yuv420p", tick
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.thread_count = ENDLESS, 0, codec.threads
        context.colorspace = context.color_primaries = context.color_trc = BT709
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            frame.pts, frame.time_base = first_frame + index, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def boxes(data: bytes) -> list[tuple[bytes, int, int]]:
    """The top-level boxes of an MP4: (name, start, end)."""
    found, at = [], 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8 or at + size > len(data):
            break
        found.append((data[at + 4 : at + 8], at, at + size))
        at += size
    return found


def _start_of(data: bytes, name: bytes) -> int:
    for box, start, _ in boxes(data):
        if box == name:
            return start
    raise IntegrityError("this is no fragment", got=f"no {name.decode()} box", expected="what `fragment` writes")


def codecs_of(init: bytes) -> str:
    """The codecs parameter of a stream's media type, from the init segment (RFC 6381)."""
    if (at := init.find(b"avcC")) >= 0:
        return f"avc1.{init[at + 5 : at + 8].hex().upper()}"
    if (at := init.find(b"vpcC")) >= 0:
        profile, level, depth = init[at + 8], init[at + 9], init[at + 10] >> 4
        return f"vp09.{profile:02}.{level:02}.{depth:02}"
    if (at := init.find(b"av1C")) >= 0:
        sequence, more = init[at + 5], init[at + 6]
        tier, depth = "H" if more & 0x80 else "M", 10 if more & 0x40 else 8
        return f"av01.{sequence >> 5}.{sequence & 31:02}{tier}.{depth:02}"
    raise IntegrityError("this is no init segment", got="no codec's box", expected="avcC, vpcC or av1C")


def film(init: bytes, media: Iterable[bytes], path: Path) -> None:
    """Put fragments together to an mp4 that can be played while it loads, atomically; nothing is encoded again."""
    joined = io.BytesIO(b"".join([init, *media]))
    options = {"movflags": "+faststart"}
    with atomic_path(path) as partial, av.open(joined, "r") as source:
        with av.open(f"file:{partial}", "w", format="mp4", options=options) as target:
            target.metadata["comment"] = "made with longtake"
            origin = source.streams.video[0]
            stream = target.add_stream_from_template(origin, opaque=True)
            for packet in source.demux(origin):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
