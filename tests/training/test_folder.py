from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from films import frames_from_video
from folder_writer import write_digits_folder
from torch import Tensor

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.training.data.digits import Digits, caption, chunk_prompts
from longtake.training.data.folder import Folder
from longtake.training.data.named import dataset_from_name
from longtake.training.models.presets import PRESETS, TINY, Preset
from longtake.training.models.wan.prompts import CUT_PREFIX
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.video import write_video

CPU = torch.device("cpu")
MINI = replace(TINY, height=32, width=32)


def write_clip(root: Path, sample: str, name: str, frames: range, fps: int = 24) -> Path:
    """A clip whose frames show their numbers as eight stripes, a bit each; its caption is "SAMPLE NAME"."""
    bits = np.asarray(frames)[:, None] >> np.arange(8) & 1
    stripes = np.repeat(30 + 195 * bits, 8, 1)[:, None, :, None]
    path = root / "video" / sample / f"{name}.mp4"
    write_video(path, np.broadcast_to(stripes, (len(frames), 64, 64, 3)).astype(np.uint8), fps)
    write_caption(root, sample, name, json.dumps({"caption": f"{sample} {name}"}))
    return path


def write_caption(root: Path, sample: str, name: str, content: str) -> None:
    path = root / "caption" / sample / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shown(video_3THW: Tensor) -> list[int]:
    """The number each frame shows."""
    bits_T8 = video_3THW[0].unflatten(-1, (8, -1)).mean((1, 3)) > 0
    return (bits_T8 * 2 ** torch.arange(8)).sum(1).tolist()


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """One sample of three shots of 70, 40 and 70 frames, numbered through; it has room for just four chunks."""
    write_clip(tmp_path, "film", "1", range(70))
    write_clip(tmp_path, "film", "2", range(70, 110))
    write_clip(tmp_path, "film", "10", range(110, 180))
    return tmp_path


def test_shots_follow_in_numeric_order_and_give_whole_segments(film: Path) -> None:
    batch = dataset_from_name(film, MINI, "eval").sample(generator(), 5, 2, CPU)
    assert batch.video.shape == (2, 3, 29 + 4 * 32, 32, 32) and batch.video.dtype == torch.float32
    wanted = [*range(61), *range(70, 102), *range(110, 174)]
    for video, prompts, cuts in zip(batch.video, batch.prompts, batch.cuts):
        assert shown(video) == wanted
        assert prompts == ["film 1", "film 1", CUT_PREFIX + "film 2", CUT_PREFIX + "film 10", "film 10"]
        assert cuts == [False, False, True, True, False]


def test_training_starts_anywhere_and_repeats_with_the_seed(film: Path) -> None:
    folder = Folder(film, MINI)
    first, again = (folder.sample(generator(1), 2, 8, CPU) for _ in range(2))
    assert torch.equal(first.video, again.video) and first.prompts == again.prompts
    assert not torch.equal(first.video, folder.sample(generator(2), 2, 8, CPU).video)
    assert len({shown(video)[0] for video in first.video}) >= 5
    for video, cuts in zip(first.video, first.cuts):
        begin = shown(video)[0]
        second = begin + 29 if not cuts[1] else 70 if begin < 70 else 110
        assert shown(video) == [*range(begin, begin + 29), *range(second, second + 32)]


def test_other_frame_rates_are_resampled_to_the_nearest_frame(tmp_path: Path) -> None:
    write_clip(tmp_path, "slow", "0", range(15), fps=12)
    write_clip(tmp_path, "slow", "1", range(100, 164), fps=48)
    batch = Folder(tmp_path, MINI, "eval").sample(generator(), 2, 1, CPU)
    halves = [(k + 1) // 2 for k in range(29)]
    assert shown(batch.video[0]) == [*halves, *range(100, 164, 2)]


def test_a_long_clip_is_split_into_virtual_shots(tmp_path: Path) -> None:
    write_clip(tmp_path, "long", "0", range(200))
    folder = dataset_from_name(tmp_path, MINI, "eval", max_chunks_per_shot=2)
    batch = folder.sample(generator(), 4, 1, CPU)
    assert shown(batch.video[0]) == [*range(61), *range(61 + 24, 61 + 24 + 64)]
    assert batch.cuts == [[False, False, True, False]]
    assert batch.prompts == [["long 0", "long 0", CUT_PREFIX + "long 0", "long 0"]]


def test_vae_clips_are_consecutive_frames_with_at_most_one_cut(film: Path) -> None:
    folder = Folder(film, MINI)
    video = folder.clips(generator(), 17, 24, CPU)
    assert video.shape == (24, 3, 17, 32, 32)
    jumps = [int((np.diff(shown(clip)) != 1).sum()) for clip in video]
    assert set(jumps) == {0, 1} and jumps.count(0) > jumps.count(1)
    places = {int(at) for clip in video for at in np.flatnonzero(np.diff(shown(clip)) != 1)}
    assert places <= {0, 4, 8, 12}  # between two latents: the first is one frame, each other four


def spoil(root: Path) -> dict[str, str]:
    """Seven clips with something wrong each; returns what is said about them."""
    for name in ("corrupt", "empty", "audio", "no_json", "no_text", "blank", "no_caption"):
        write_clip(root, "bad", name, range(40))
    videos = root / "video" / "bad"
    (videos / "corrupt.mp4").write_bytes(b"no video" * 99)
    (videos / "empty.mp4").write_bytes(b"")
    with av.open(str(videos / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    write_caption(root, "bad", "no_json", "a green seven")
    write_caption(root, "bad", "no_text", '{"caption": 7}')
    write_caption(root, "bad", "blank", '{"caption": "  "}')
    (root / "caption" / "bad" / "no_caption.json").unlink()
    return {
        "corrupt": "cannot read",
        "empty": "is empty",
        "audio": "has no picture (audio only)",
        "no_json": "is not valid JSON",
        "no_text": "has no caption",
        "blank": "has no caption",
        "no_caption": "does not exist",
    }


def test_unusable_clips_are_skipped_counted_and_named(film: Path, caplog: pytest.LogCaptureFixture) -> None:
    reasons = spoil(film)
    with caplog.at_level(logging.INFO):
        folder = Folder(film, MINI)
    assert {path.stem for path in folder.skipped} == set(reasons)
    for path, reason in folder.skipped.items():
        assert reasons[path.stem] in reason and "\n" not in reason
        assert any(reason in record.getMessage() for record in caplog.records)
    assert "3 clips, 8 s" in caplog.text and "7 ignored: " in caplog.text
    assert folder.sample(generator(), 2, 4, CPU).video.isfinite().all()


def test_no_usable_clip_names_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "video").mkdir()
    with pytest.raises(LongtakeError, match=r"no clips in .*\n.*\n.*clip.mp4 beside clip.txt") as caught:
        Folder(tmp_path, MINI)
    spoil(tmp_path)
    with pytest.raises(LongtakeError, match="no usable clip") as caught:
        dataset_from_name(tmp_path, MINI)
    message = str(caught.value)
    assert "7 clips, none of them usable" in message and "audio.mp4 has no picture (audio only)" in message
    assert "and 2 more" in message and "caption/<sample>/<n>.json" in message


def test_clips_too_short_for_the_story(film: Path) -> None:
    with pytest.raises(LongtakeError, match="long enough") as caught:
        Folder(film, MINI).sample(generator(), 6, 1, CPU)
    assert "180 frames at 24 fps" in str(caught.value) and "--chunks" in str(caught.value)


def test_a_clip_that_ends_in_the_middle_is_left_out(film: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_clip(film, "cut_off", "0", range(120))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 5])
    folder = Folder(film, MINI)
    batch = folder.sample(generator(), 3, 6, CPU)
    assert all(prompt.endswith(("film 1", "film 2", "film 10")) for story in batch.prompts for prompt in story)
    repeated = Folder(film, MINI)
    repeated.clips(generator(9), 17, 2, CPU)  # what was read before makes no difference
    assert torch.equal(repeated.sample(generator(), 3, 6, CPU).video, batch.video)


def test_one_sample_in_five_is_held_out(tmp_path: Path) -> None:
    for sample in range(6):
        write_clip(tmp_path, str(sample), "0", range(sample * 30, sample * 30 + 30))
    seen = {}
    for split in ("train", "eval"):
        batch = dataset_from_name(tmp_path, MINI, split).sample(generator(), 1, 30, CPU)
        seen[split] = {prompt for story in batch.prompts for prompt in story}
    assert seen == {"train": {f"{n} 0" for n in range(5)}, "eval": {"5 0"}}


def test_digits_in_a_folder_are_the_digits(tmp_path: Path, small_preset: Preset) -> None:
    (story,) = write_digits_folder(tmp_path, small_preset, 1, seed=3, chunks=4)
    assert len(story.shots) > 1
    batch = Folder(tmp_path, small_preset, "eval").sample(generator(), 4, 1, CPU)
    assert (batch.video - Digits(small_preset).render([story], CPU)).abs().mean() < 0.03
    assert (batch.prompts[0], batch.cuts[0]) == chunk_prompts(story)
    for number, shot in enumerate(story.shots):
        frames, fps = frames_from_video(tmp_path / "video" / "0000" / f"{number}.mp4")
        assert fps == 24 and len(frames) == 32 * shot.chunks - 3 * (number == 0)
        assert read_json(tmp_path / "caption" / "0000" / f"{number}.json") == {"caption": caption(shot)}


@pytest.fixture
def clips_folder(tmp_path: Path, small_preset: Preset, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digits of 32x32 pixels; the small preset takes that size."""
    preset = replace(small_preset, height=32, width=32)
    monkeypatch.setitem(PRESETS, preset.name, preset)
    write_digits_folder(tmp_path / "clips", preset, 2, seed=1, chunks=2)
    return tmp_path / "clips"


def train(capsys: pytest.CaptureFixture[str], clips: Path, *words: str) -> str:
    code = main(["train", "--preset", "small", "--device", "cpu", "--data", str(clips), "--batch", "1", *words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out + captured.err


def test_the_dit_trains_on_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, clips_folder: Path, small_preset: Preset, vae_folder: Path
) -> None:
    text = train(capsys, clips_folder, "--stage", "dit", "--vae", str(vae_folder), "--steps", "2", "--stories", "2",
                 "--chunks", "1..2", "--max-chunks-per-shot", "2", "--out", str(tmp_path / "dit"))  # fmt: skip
    assert "evaluation: " in text
    meta = read_json(tmp_path / "dit" / "dit.json")
    assert meta["step"] == 2 and meta["max_chunks_per_shot"] == 2
    DiTStage(StageOptions(small_preset, init=tmp_path / "dit", vae=vae_folder))  # the checkpoint loads


def test_the_vae_trains_on_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, clips_folder: Path) -> None:
    text = train(capsys, clips_folder, "--stage", "vae", "--steps", "1", "--out", str(tmp_path / "vae"))
    assert "psnr_db" in text and read_json(tmp_path / "vae" / "vae.json")["step"] == 1


def test_films_of_any_suffix_in_any_case_and_one_line_for_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shot 1 must not go missing between 0 and 2; what is no clip is named with its reason."""
    for number, suffix in enumerate((".mp4", ".MP4", ".Mov", ".mkv", ".WEBM")):
        path = write_clip(tmp_path, "film", str(number), range(29))
        path.rename(path.with_suffix(suffix))
    (tmp_path / "caption" / "film" / "1.json").rename(tmp_path / "caption" / "film" / "1.JSON")
    for name in ("notes.txt", "film/0.mov", "film/cover.jpg", "film/.DS_Store"):
        (tmp_path / "video" / name).write_text("no film")
    write_caption(tmp_path, "film", "9", "{}")
    caplog.set_level(logging.INFO)
    folder = Folder(tmp_path, MINI)
    assert [clip.path.name for clip in folder.samples[0]] == ["0.mp4", "1.MP4", "2.Mov", "3.mkv", "4.WEBM"]
    (line,) = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert "5 clips, 6 s" in line and "5 ignored: " in line and "video/notes.txt (not in video/<sample>/" not in line
    for part in ("notes.txt (not mp4, mov, mkv, webm)", "cover.jpg (not mp4", ".DS_Store (hidden)", "beside 0.m",
                 "film/9.json (no clip of this name)"):  # fmt: skip
        assert part in line
