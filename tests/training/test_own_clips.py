"""Clips and captions in the layouts that people have; what they are and what is left out, in one line."""

from __future__ import annotations

import builtins
import csv
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.errors import LongtakeError
from longtake.training.data.captions import rows_of_table
from longtake.training.data.clips import SHORT, ClipReader, clips_from_folder
from longtake.training.data.folder import Folder
from longtake.training.data.named import dataset_from_name
from longtake.training.models.presets import TINY
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.stages.vae import VAEStage
from longtake.video import write_video

MINI = replace(TINY, height=32, width=32)
CPU = torch.device("cpu")
CAPTIONS = {"one": "a dog sleeps", "two": "a man laughs", "three": "a red car"}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """three films, one.mp4, two.mov and three.webm, of 40 frames in one brightness each."""
    folder = tmp_path_factory.mktemp("films")
    for number, name in enumerate(CAPTIONS):
        write_video(folder / f"{name}.mp4", np.full((40, 32, 48, 3), 60 + 60 * number, np.uint8), 24)
    (folder / "two.mp4").rename(folder / "two.MOV")
    (folder / "three.mp4").rename(folder / "three.webm")
    return folder


def with_txt(root: Path) -> None:
    for name, caption in CAPTIONS.items():
        (root / f"{name}.TXT").write_text(f"  {caption}\n")


def with_json(root: Path) -> None:
    for name, caption in CAPTIONS.items():
        (root / f"{name}.json").write_text(json.dumps({"text": caption}))


def with_csv(root: Path) -> None:
    with open(root / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows(
            [("File_Name", "note", "Caption"), *((f"{n}{s}", "", CAPTIONS[n]) for n, s in SUFFIXES.items())]
        )


SUFFIXES = {"one": ".mp4", "two": "", "three": ".webm"}  # a name without its suffix is found, too


def with_jsonl(root: Path) -> None:
    rows = [{"video": f"{name}{suffix}", "prompt": CAPTIONS[name]} for name, suffix in SUFFIXES.items()]
    (root / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")


def with_list(root: Path) -> None:
    rows = [{"path": f"{name}{suffix}", "caption": CAPTIONS[name]} for name, suffix in SUFFIXES.items()]
    (root / "clips.json").write_text(json.dumps(rows))


def with_parquet(root: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"file": [f"{n}{s}" for n, s in SUFFIXES.items()], "caption": list(CAPTIONS.values())}
    parquet.write_table(pyarrow.table(columns), root / "metadata.parquet")


def with_tars(root: Path) -> None:
    """Two shards, captions as txt and as json; the films lie in them only."""
    with_txt(root)
    (root / "three.TXT").rename(root / "three.txt")
    (root / "two.TXT").write_text("not this one")
    (root / "two.json").write_text(json.dumps({"caption": CAPTIONS["two"]}))
    for shard, names in (("a.tar", ("one", "two")), ("b.TAR", ("three",))):
        with tarfile.open(root / shard, "w") as tar:
            for name in names:
                for path in sorted(root.glob(f"{name}.*")):
                    tar.add(path, f"./{path.name}")
                    path.unlink()


def nested(root: Path) -> None:
    with_txt(root)
    for name in CAPTIONS:
        (root / "deep" / name).mkdir(parents=True)
        for path in root.glob(f"{name}.*"):
            path.rename(root / "deep" / name / path.name)


LAYOUTS = (with_txt, with_json, with_csv, with_jsonl, with_list, with_parquet, with_tars, nested)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_layout_gives_each_clip_its_caption(films: Path, tmp_path: Path, layout: Callable[[Path], None]) -> None:
    root = shutil.copytree(films, tmp_path / "clips")
    layout(root)
    index = clips_from_folder(root, MINI)
    clips = {clip.path.stem: clip for (clip,) in index.samples.values()}
    assert {name: clip.caption for name, clip in clips.items()} == CAPTIONS
    assert not index.skipped and not index.ignored and {clip.frames for clip in clips.values()} == {40}
    batch = Folder(root, MINI).sample(torch.Generator().manual_seed(0), 1, 8, CPU)
    shades = {prompt: float(video.mean() * 127.5 + 127.5) for (prompt,), video in zip(batch.prompts, batch.video)}
    for number, caption in enumerate(CAPTIONS.values()):
        assert abs(shades[caption] - 60 - 60 * number) < 3
    stories = [Folder(root, MINI).take(number, 0, 1) for number in range(3)]
    assert {story.prompts[0] for story in stories} == set(CAPTIONS.values())
    assert len({story.key for story in stories}) == 3


@pytest.mark.parametrize("name", ["metadata.csv", "a.tar"])
def test_a_table_or_a_tar_may_be_named_itself(films: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(films, tmp_path / "clips")
    (with_csv if name.endswith("csv") else with_tars)(root)
    data = dataset_from_name(root / name, MINI)
    assert set(data.captions) <= set(CAPTIONS.values()) and len(data.captions) >= 2


def test_one_line_says_what_there_is_and_why_something_is_not(films: Path, tmp_path: Path) -> None:
    root = shutil.copytree(films, tmp_path / "clips")
    with_txt(root)
    write_video(root / "untold.mp4", np.zeros((48, 32, 32, 3), np.uint8), 24)
    (root / "old.avi").write_text("film")
    (root / "lonely.txt").write_text("a caption without a film")
    line = Folder(root, MINI).line
    assert line.startswith(f"{root}: 3 clips, 5 s (1.7 s each), 48x32 to 32x32 (crop), 0 held out, 3 ignored: ")
    for part in ("untold.txt does not exist", "old.avi (not mp4, mov, mkv, webm)", "lonely.txt (no clip of this name)"):
        assert part in line


def test_captions_of_a_table_come_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('file_name,caption\n\na.mp4,"a man, laughing"\nb.mp4,a dog,\n')
    assert [row["caption"] for row in rows_of_table(tmp_path / "a.csv")] == ["a man, laughing", "a dog"]
    (tmp_path / "a.jsonl").write_text('{"file": "a.mp4", "caption": "one line\u2028another"}\n', encoding="utf-8")
    assert [row["caption"] for row in rows_of_table(tmp_path / "a.jsonl")] == ["one line\u2028another"]


@pytest.mark.timeout(60)  # whoever opens a pipe waits for ever
@pytest.mark.parametrize("shots", [False, True])
def test_pipes_and_broken_links_are_no_clips(films: Path, tmp_path: Path, shots: bool) -> None:
    root = shutil.copytree(films, tmp_path / "clips")
    with_txt(root)
    folder = root
    if shots:
        folder = root / "video" / "film"
        (root / "caption" / "film").mkdir(parents=True)
        folder.mkdir(parents=True)
        shutil.move(root / "one.mp4", folder / "0.mp4")
        (root / "caption" / "film" / "0.txt").write_text("a film")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "link.mp4").symlink_to("nowhere.mp4")
    ignored = clips_from_folder(root, MINI).ignored
    assert {path.name for path, why in ignored.items() if "broken link, or a pipe" in why} == {"pipe.mp4", "link.mp4"}


def test_held_out_clips_are_as_many_as_asked_for(films: Path, tmp_path: Path) -> None:
    for number in range(8):
        shutil.copy(films / "one.mp4", tmp_path / f"{number}.mp4")
        (tmp_path / f"{number}.txt").write_text(f"clip {number}")
    held = {asked: dataset_from_name(tmp_path, MINI, "eval", held_out=asked).captions for asked in (None, 2, 0)}
    assert [len(held[None]), len(held[2]), len(held[0])] == [1, 2, 8]
    train = dataset_from_name(tmp_path, MINI, "train", held_out=2)
    assert set(train.captions) | set(held[2]) == {f"clip {number}" for number in range(8)}
    assert len(train.captions) == 6 and "2 held out" in train.line
    assert "8 clips, 13 s" in Folder(tmp_path, MINI).line and "1 held out" in Folder(tmp_path, MINI).line
    with pytest.raises(LongtakeError, match="nothing is left to train on"):
        dataset_from_name(tmp_path, MINI, held_out=8)


def spoilt(root: Path, name: str, content: str | bytes) -> str:
    """What is said of a data set with this file, on one line."""
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LongtakeError) as caught:
        dataset_from_name(root / name, MINI)
    return " ".join(str(caught.value).split())


def test_tables_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lacks a column" in (said := spoilt(tmp_path, "a.csv", "file_name,title\na.mp4,x\n")) and "caption" in said
    assert "lacks a column" in spoilt(tmp_path, "b.csv", "nothing,caption\na,b\n")
    assert "line 2 of" in spoilt(tmp_path, "c.jsonl", '{"file": "a.mp4", "caption": "x"}\nno json\n')
    assert "is no table" in spoilt(tmp_path, "e.csv", "file_name,caption\na.mp4," + "x" * 200_000)
    said = spoilt(tmp_path, "f.csv", "file_name,caption\na.mp4,a man laughs, in a car\n")  # half of it would be lost
    assert "row 1 of" in said and "more fields than there are columns" in said and "in quotes" in said
    assert "a column twice" in spoilt(tmp_path, "g.csv", "file_name,caption,caption\na.mp4,x,y\n")
    assert "is no table" in spoilt(tmp_path, "h.csv", 'file_name,caption\na.mp4,"x\nb.mp4,y\n')  # two clips as one
    assert "is not UTF-8 text" in spoilt(tmp_path, "d.csv", b"file_name,caption\na.mp4,\xff\xfe\n")
    assert "does not exist" in spoilt(tmp_path, "e.csv", "file_name,caption\ngone.mp4,x\n")
    assert "no clips in" in spoilt(tmp_path, "f.csv", "file_name,caption\n")
    assert "row 1 (no file)" in spoilt(tmp_path, "h.csv", "file_name,caption\n,x\n")
    assert "cannot be read" in spoilt(tmp_path, "g.tar", b"no tar" * 300)
    with pytest.raises(LongtakeError, match="no such data set"):
        dataset_from_name(tmp_path / "nonesuch", MINI)
    own = builtins.__import__

    def without(name: str, *words: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return own(name, *words)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "longtake[data]" in spoilt(tmp_path, "m.parquet", b"PAR1")


def test_a_long_film_is_never_kept_as_a_whole(tmp_path: Path) -> None:
    """340 frames of 128 x 128 are kept; 700 are read by seeking, and nothing of them stays."""
    frames = np.arange(700, dtype=np.int64)[:, None, None, None] % 200 + np.zeros((1, 16, 16, 3), np.int64)
    for count in (300, 700):
        write_video(tmp_path / f"{count}.mp4", frames[:count].astype(np.uint8), 24)
        (tmp_path / f"{count}.txt").write_text("a film")
    index = clips_from_folder(tmp_path, TINY)
    reader = ClipReader(TINY)
    short, long = (index.samples[name][0] for name in ("300", "700"))
    assert abs(int(reader.read(long, 600, 29)[0].mean()) - 600 % 200) <= 2 and not reader._kept
    assert abs(int(reader.read(short, 150, 29)[0].mean()) - 150) <= 2
    assert 0 < sum(kept.nbytes for kept in reader._kept.values()) <= SHORT


def test_fit_reaches_the_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The left third of a wide film is white: a crop of the middle shows none of it, a stretch a third."""
    caplog.set_level(logging.INFO)
    frames = np.zeros((40, 32, 96, 3), np.uint8)
    frames[:, :, :32] = 255
    write_video(tmp_path / "a.mp4", frames, 24)
    (tmp_path / "a.txt").write_text("a wide film")
    white = {}
    for fit in ("crop", "pad", "stretch"):
        video = dataset_from_name(tmp_path, MINI, fit=fit).sample(torch.Generator(), 1, 1, CPU).video
        white[fit] = float((video > 0.5).float().mean())
        assert f"96x32 to 32x32 ({fit})" in caplog.text
    assert white["crop"] < 0.02 and abs(white["pad"] - 1 / 9) < 0.04 and abs(white["stretch"] - 1 / 3) < 0.04


def clips_of(root: Path, *told: tuple[int, str]) -> Path:
    """Films of so many frames with these captions."""
    for number, (frames, caption) in enumerate(told):
        write_video(root / f"{number}.mp4", np.full((frames, 32, 32, 3), 90, np.uint8), 24)
        if caption:
            (root / f"{number}.txt").write_text(caption)
    return root


def said(root: Path, **options: Any) -> str:
    """What training says of its data before the first step."""
    preset = replace(MINI, name="mini")
    return DiTStage(StageOptions(preset=preset, data=str(root), **options)).line


def test_what_is_too_short_is_said_before_the_first_step(tmp_path: Path) -> None:
    root = clips_of(tmp_path, (40, "a dog"), (20, "a cat"), (70, "a car"))
    assert "1 of 3 for train are shorter than 1.2 s and are never used: 1.mp4 (0.8 s)" in said(root, chunks=(1,))
    assert "2 of 3 for train are shorter than 2.5 s and are never used: 0.mp4 (1.7 s), 1.mp4" in said(
        root, chunks=(1, 2)
    )
    with pytest.raises(LongtakeError, match="no sample in .* is long enough") as caught:
        said(root, chunks=(3,))
    assert "--chunks" in str(caught.value)
    assert "1 of 3 for train are shorter than 1.2 s" in VAEStage(StageOptions(preset=MINI, data=str(root))).line


def test_one_clip_and_captions_that_are_alike_are_said(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "alike").mkdir()
    one = said(clips_of(tmp_path / "one", (40, "a dog")), chunks=(1,))
    assert "1 clip, 2 s" in one and "makes that clip of every prompt" in one
    alike = said(clips_of(tmp_path / "alike", (40, "a dog"), (40, "a dog")), chunks=(1,))
    assert "all 2 captions are the same, so prompts will make no difference: 'a dog'" in alike


def test_missing_captions_are_named_and_too_many_are_refused(tmp_path: Path) -> None:
    root = clips_of(tmp_path, (40, "a dog"), (40, "a cat"), (40, ""), (40, ""), (40, ""))
    assert "3 ignored: " in (line := said(root, chunks=(1,), max_bad_share=0.7)) and "2.txt does not exist" in line
    with pytest.raises(LongtakeError, match="too many clips") as caught:
        said(root, chunks=(1,))
    assert "3 of 5" in str(caught.value) and "--max-bad-share" in str(caught.value)


def test_mixed_sizes_are_said_with_what_becomes_of_them(tmp_path: Path) -> None:
    for number, size in enumerate(((32, 32), (48, 32), (32, 64), (16, 96), (64, 64))):
        write_video(tmp_path / f"{number}.mp4", np.full((40, *size, 3), 90, np.uint8), 24)
        (tmp_path / f"{number}.txt").write_text(f"clip {number}")
    assert "32x32, 32x48, 64x32 and 2 more to 32x32 (pad), 1 held out" in said(tmp_path, chunks=(1,), fit="pad")
