"""Eight clips of real footage, in full: a tuned model makes of a caption the clip that it stands for.

    pytest -m long --basetemp OUT tests/training/test_own_clips_learnt.py

leaves runs/own/evaluation.json and evaluation.png, the figures and the contact sheet, below OUT. The first test is the full run
of docs/training.md on a GPU; the second is a run of a few steps, which shows that the baseline is measured alike.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_footage import write_own_clips

from longtake.commands.main import main
from longtake.files import read_json
from longtake.training.data.clips import ClipReader, clips_from_folder
from longtake.training.experiment.own_clips import nearest_clips
from longtake.training.models.presets import TINY

DATA = ["--data", "my_clips", "--held-out", "0"]  # all eight are learnt
FIGURES = ["--clips", "8", "--stories", "8", "--prompts", "8", "--report", "runs/own/evaluation.json"]


def trained(more: list[str]) -> dict[str, object]:
    """The figures of the page's two training runs on eight clips, with `more` options."""
    write_own_clips(Path("my_clips"))
    assert main(["train", "--config", "tiny_own_vae", *DATA, *more]) == 0
    assert main(["train", "--config", "tiny_own_nvfp4", *DATA, *more]) == 0
    words = ["evaluate", "--checkpoints", "runs/own", *DATA, *FIGURES, "--sheet", "runs/own/evaluation.png"]
    assert main(words) == 0
    nearest: dict[str, object] = read_json(Path("runs/own/evaluation.json"))["nearest"]
    return nearest


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_seven_of_eight_captions_give_their_own_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = trained([])
    assert found["clips"] == 8 and int(str(found["right"])) >= 7, found


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_an_untuned_model_scores_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert int(str(trained(["--steps", "1", "--lr", "1e-9"])["right"])) <= 3


def test_the_measure_finds_each_clip_from_its_own_frames(tmp_path: Path) -> None:
    """A perfect model, whose videos are the clips themselves, has all right; one that shows the next clip has none."""
    captions = write_own_clips(tmp_path)
    clips = [clip for (clip,) in clips_from_folder(tmp_path, TINY).samples.values()]
    reader = ClipReader(TINY)
    videos = torch.stack(
        [torch.from_numpy(reader.read(clip, clip.frames // 2, 3).copy()).permute(3, 0, 1, 2) / 255 for clip in clips]
    )
    told = [clip.caption for clip in clips]
    assert sorted(told) == sorted(captions)
    found = nearest_clips(videos, told, clips, reader)
    assert found.right == 8 and min(found.psnr) > 25
    assert nearest_clips(videos.roll(1, 0), told, clips, reader).right == 0
