from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from films import frames_from_video

from longtake.errors import LongtakeError
from longtake.video import VideoWriter, probe_video, write_video

PALETTE = np.array([[230, 30, 30], [30, 200, 60], [40, 90, 250], [240, 240, 240], [20, 20, 20]], np.uint8)


def flat(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames of one colour each; neighbours differ much."""
    colours = PALETTE[np.arange(count) % len(PALETTE)]
    return np.broadcast_to(colours[:, None, None], (count, height, width, 3)).copy()


def moving(count: int) -> np.ndarray:
    """A bright disc on a gradient, moving."""
    y, x = np.mgrid[:128, :128]
    frames = np.stack([np.stack([y + 40, x + 20, x + y], -1) for _ in range(count)]).clip(0, 255)
    for i, frame in enumerate(frames):
        frame[(x - 30 - 2 * i) ** 2 + (y - 64) ** 2 < 400] = (250, 220, 60)
    return frames.astype(np.uint8)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk, writes beyond `size` bytes fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_frames_come_back_in_order_with_their_colours_and_rate(tmp_path: Path) -> None:
    frames = flat(29)
    with VideoWriter(tmp_path / "new" / "a.mp4", 24) as writer:
        writer.write(frames[:8])
        writer.write(frames[8:])
    again, fps = frames_from_video(tmp_path / "new" / "a.mp4")
    assert fps == 24 and again.shape == frames.shape and again.dtype == np.uint8
    assert np.abs(again.astype(int) - frames).max() <= 6
    assert probe_video(tmp_path / "new" / "a.mp4") == (29, 24.0)


def test_quality_and_format_that_every_player_takes(tmp_path: Path) -> None:
    frames = moving(24)
    write_video(tmp_path / "a.mp4", frames, 24)
    again, _ = frames_from_video(tmp_path / "a.mp4")
    error = again.astype(float) - frames
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 33  # 4:2:0 blurs the disc's edge
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.duration and stream.time_base and float(stream.duration * stream.time_base) == pytest.approx(1.0)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # starts to play before it is loaded


def test_nothing_under_the_final_name_before_close(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    writer = VideoWriter(path, 24)
    writer.write(flat(5))
    assert path.read_bytes() == b"older"
    writer.close()
    writer.close()
    assert len(frames_from_video(path)[0]) == 5 and list(tmp_path.iterdir()) == [path]


def test_an_interruption_keeps_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 24) as writer:
        writer.write(flat(7))
        raise KeyboardInterrupt
    assert len(frames_from_video(tmp_path / "a.mp4")[0]) == 7


def test_without_frames_there_is_no_file_and_the_older_one_stays(tmp_path: Path) -> None:
    (tmp_path / "older.mp4").write_bytes(b"older")
    for name in ("new.mp4", "older.mp4"):
        VideoWriter(tmp_path / name, 24).close()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


def test_a_full_disk_is_one_clear_error_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
    writer = VideoWriter(path, 24)
    with largest_file(20_000), pytest.raises(LongtakeError, match="cannot write .*a.mp4") as caught:
        try:
            writer.write(noise)
        finally:
            writer.close()
    assert "free space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LongtakeError, match="cannot write .*a.mp4"):
        write_video(tmp_path / "file" / "a.mp4", flat(2), 24)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (flat(2).astype(np.float32), "float32"),
        (flat(2, 33), r"even H and W"),
        (flat(2)[..., :1], r"\(2, 32, 48, 1\)"),
        (flat(2)[0], r"\(32, 48, 3\)"),
    ],
)
def test_bad_frames(tmp_path: Path, frames: np.ndarray, message: str) -> None:
    with pytest.raises(LongtakeError, match=message):
        write_video(tmp_path / "a.mp4", frames, 24)
    assert not list(tmp_path.iterdir())


def test_frames_of_another_size_or_after_the_end(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 24)
    writer.write(flat(2))
    with pytest.raises(LongtakeError, match="one size"):
        writer.write(flat(2, 64))
    writer.close()
    with pytest.raises(LongtakeError, match="is finished"):
        writer.write(flat(2))
    assert len(frames_from_video(tmp_path / "a.mp4")[0]) == 2


@pytest.mark.parametrize(("fps", "wanted"), [(24, [0, 1, 1, 2, 2, 3, 3, 4, 4]), (12, [0, 1, 2, 3, 4]), (4, [0, 3])])
def test_resampling_takes_the_nearest_frame(tmp_path: Path, fps: int, wanted: list[int]) -> None:
    """Frame k is number k * 12 / fps of the file, rounded, halves up."""
    write_video(tmp_path / "a.mp4", flat(5), 12)
    frames, rate = frames_from_video(tmp_path / "a.mp4", (16, 24), fps)
    assert rate == fps and frames.shape[1:] == (16, 24, 3)
    got = [int(np.abs(PALETTE.astype(int) - pixel).sum(1).argmin()) for pixel in frames[:, 8, 12].astype(int)]
    assert got == wanted


def audio_only(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("function", [frames_from_video, probe_video])
def test_files_that_are_no_videos(tmp_path: Path, function: Callable[[Path], object]) -> None:
    audio_only(tmp_path / "audio.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    write_video(tmp_path / "whole.mp4", moving(12), 24)
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "beginning.mp4").write_bytes(content[: content.index(b"moov") + 40])
    for name, message in {
        "missing": "missing.mp4 does not exist",
        "audio": "audio.mp4 has no picture\n  got: audio only",
        "empty": "empty.mp4 is empty",
        "text": "cannot read .*text.mp4\n  got: .*Invalid data",
        "beginning": "beginning.mp4 has no picture\n  got: no streams",
    }.items():
        with pytest.raises(LongtakeError, match=message) as caught:
            function(tmp_path / f"{name}.mp4")
        assert "fix:" in str(caught.value)
    with pytest.raises(LongtakeError, match="is not a file"):
        function(tmp_path)
