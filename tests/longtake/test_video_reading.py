"""Videos as people have them: turned, of varying rate, with cover pictures, under any name."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from films import frames_from_video

from longtake.errors import LongtakeError
from longtake.video import VideoWriter, count_frames, probe_video, write_video

# What the display matrix (xx, xy, yx, yy) makes of the coded picture, by numpy.
TURNS = {
    (1, 0, 0, 1): lambda x: x,
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x.swapaxes(0, 1), 2),
}


def turn(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Write a display matrix into an mp4's track header, as phones do."""
    content = bytearray(path.read_bytes())
    xx, xy, yx, yy = (int(value * 65536) for value in matrix)
    struct.pack_into(">9i", content, content.index(b"tkhd") + 4 + 40, xx, xy, 0, yx, yy, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_stand_as_players_show_them(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    frame = np.full((64, 96, 3), 60, np.uint8)
    frame[:32, :32], frame[32:, :32] = (230, 30, 30), (30, 200, 60)
    write_video(tmp_path / "a.mp4", np.stack([frame] * 3), 24)
    turn(tmp_path / "a.mp4", matrix)
    wanted = TURNS[matrix](frame)
    got = frames_from_video(tmp_path / "a.mp4")[0]
    assert got.shape == (3, *wanted.shape) and np.abs(got[0].astype(int) - wanted)[::8, ::8].mean() < 8
    small = frames_from_video(tmp_path / "a.mp4", (16, 32))[0][0].astype(int)
    wanted = wanted[:: wanted.shape[0] // 16, :: wanted.shape[1] // 32][:16, :32]
    assert small.shape == (16, 32, 3) and np.abs(small - wanted).mean() < 12


def test_an_odd_angle_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((2, 32, 32, 3), np.uint8), 24)
    turn(tmp_path / "a.mp4", (0.7, 0.7, -0.7, 0.7))
    with pytest.raises(LongtakeError, match="turned by an odd angle\n  got: .*\n  expected: quarter turns"):
        frames_from_video(tmp_path / "a.mp4")


def timed(path: Path, ticks: list[int], rate: int = 24, start: int = 0) -> None:
    """A video whose frame number k, of the grey level 10 k, is shown from tick number ticks[k] on, 1 / rate s each."""
    with av.open(f"file:{path}", "w") as container:
        codec = "libvpx" if path.suffix == ".webm" else "libx264"
        stream = container.add_stream(codec, rate=rate, options={"crf": "4", "b": "2M"})
        stream.width = stream.height = 32
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, rate)
        stream.codec_context.time_base = Fraction(1, rate)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = start + tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbers(frames: np.ndarray) -> list[int]:
    return (frames[:, 16, 16, 0].astype(float) / 10).round().astype(int).tolist()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.webm"])
@pytest.mark.parametrize("start", [0, 48])
def test_frames_come_by_their_time_stamps(tmp_path: Path, name: str, start: int) -> None:
    """A pause of ten ticks between frames 5 and 6 stays one; the clock may begin anywhere."""
    timed(tmp_path / name, [*range(6), *range(15, 21)], start=start)
    frames, rate = frames_from_video(tmp_path / name, fps=24)
    assert rate == 24 and numbers(frames) == [0, 1, 2, 3, 4, *[5] * 10, 6, 7, 8, 9, 10, 11]
    assert count_frames(tmp_path / name, 24) == len(frames)
    half = frames_from_video(tmp_path / name, fps=12)[0]
    assert numbers(half) == [0, 2, 4, 5, 5, 5, 5, 5, 7, 9, 11]
    assert count_frames(tmp_path / name, 12) == len(half)


def test_a_frame_held_for_long_stays_until_the_next_one_is_due(tmp_path: Path) -> None:
    timed(tmp_path / "a.mp4", [0, 1, 24, 48, 49])
    assert numbers(frames_from_video(tmp_path / "a.mp4", fps=24)[0]) == [0, *[1] * 23, *[2] * 24, 3, 4]


@pytest.mark.parametrize("fps", [4, 12, 24, 25, 30, 60])
@pytest.mark.parametrize("rate", [12, 24, 25, 30])
def test_frames_are_counted_without_decoding(tmp_path: Path, rate: int, fps: int) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((17, 32, 32, 3), np.uint8), rate)
    assert count_frames(tmp_path / "a.mp4", fps) == len(frames_from_video(tmp_path / "a.mp4", fps=fps)[0])


def test_a_broken_clock_does_not_fill_the_memory(tmp_path: Path) -> None:
    timed(tmp_path / "a.mp4", [0, 1, 24 * 3600])
    with pytest.raises(LongtakeError, match="stands still for too long\n  got: 3600 s"):
        frames_from_video(tmp_path / "a.mp4", fps=24)


def with_cover(path: Path, frames: int) -> None:
    """A cover picture first, then a film, as tagging tools write them."""
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png")
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 64, "rgb24", Disposition.attached_pic
        film = container.add_stream("libx264", rate=24) if frames else None
        if film is not None:
            film.width, film.height, film.pix_fmt = 32, 32, "yuv420p"
        black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(black))
        container.mux(cover.encode(None))
        if film is not None:
            for _ in range(frames):
                light = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 200, np.uint8), format="rgb24")
                container.mux(film.encode(light))
            container.mux(film.encode(None))


def test_a_cover_picture_is_no_film(tmp_path: Path) -> None:
    with_cover(tmp_path / "a.mp4", 12)
    frames, rate = frames_from_video(tmp_path / "a.mp4")
    assert frames.shape == (12, 32, 32, 3) and rate == 24 and frames.min() > 150
    assert probe_video(tmp_path / "a.mp4") == (12, 24.0)
    with_cover(tmp_path / "b.mp4", 0)
    with pytest.raises(LongtakeError, match=r"b.mp4 has no picture\n  got: cover picture only"):
        probe_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("name", ["shot:1.mp4", "concat:a|b.mp4", "-.mp4", "a%03d.mp4", "file:x.mp4", "http:__x.mp4"])
def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """FFmpeg takes what stands before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    with VideoWriter(name, 24) as writer:
        writer.write(np.zeros((5, 32, 32, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == [name] and probe_video(name) == (5, 24.0)
