"""docs/training.md: what it says holds, and its commands, with few steps, lead from real clips to a video."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from films import frames_from_video
from own_footage import write_own_clips

from longtake.commands.main import main
from longtake.files import read_json
from longtake.formats.exported import Export
from longtake.paths import REPOSITORY
from longtake.training.data.folder import Folder
from longtake.training.models.presets import TINY
from longtake.training.models.text.words import default_vocabulary

PAGE = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1].strip().splitlines()  # type: ignore[index]
SHORT = {
    "tiny_own_vae": "--steps 2 --batch 1 --device cpu",
    "tiny_own_nvfp4": "--steps 2 --batch 1 --stories 8 --device cpu",
    "generate": "--chunks 1 --steps 2 --backend reference",
}


def short(command: str) -> list[str]:
    """A command of the page with few steps."""
    more = next((words for name, words in SHORT.items() if name in command), "")
    return shlex.split(f"{command.removeprefix('longtake ')} {more}")


def test_at_most_five_commands_and_three_decisions() -> None:
    assert len(COMMANDS) == 5 and all(line.startswith("longtake ") for line in COMMANDS)
    assert len(re.findall(r"^## Decision", PAGE, re.M)) == 3


def test_the_line_on_the_page_is_the_one_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_own_clips(tmp_path / "my_clips")
    assert Folder(Path("my_clips"), TINY).line in PAGE


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_commands_lead_from_clips_to_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "home"))
    captions = write_own_clips(tmp_path / "my_clips")
    for command in COMMANDS:
        assert main(short(command)) == 0, command
    said = capsys.readouterr().out
    assert "8 clips, 16 s" in said and "1 held out" in said
    for folder, kinds in (("own_vae", ("vae",)), ("own", ("dit", "text_encoder", "vae"))):
        run = tmp_path / "runs" / folder
        for kind in kinds:
            assert (run / f"{kind}.safetensors").is_file() and (run / f"{kind}.json").is_file()
        assert (run / "loss.png").is_file() and (run / "run.yaml").is_file()
        assert any((run / "tensorboard").iterdir())
    words = read_json(tmp_path / "runs" / "own" / "text_encoder.json")["vocabulary"]
    assert tuple(words[: len(default_vocabulary())]) == default_vocabulary()
    assert {"rabbit", "cyclist", "laughs"} <= set(words)
    (description,) = (tmp_path / "home" / "models" / "own").glob("*/onnx/export.json")
    export = Export.read(description.parent)
    assert export.checked.state == "passed" and list(export.vocabulary) == words and export.parity
    (bundle,) = (tmp_path / "home" / "models" / "own").glob("*/engines/bundle.json")
    assert read_json(bundle)["vocabulary"] == words
    frames, rate = frames_from_video(tmp_path / "video.mp4")
    assert frames.shape == (29, 128, 128, 3) and rate == 24
    report = read_json(tmp_path / "video.json")
    assert captions[6] in str(report) and "doesn't know" not in said

    figures = ["--data", "my_clips", "--clips", "2", "--stories", "2", "--prompts", "1", "--device", "cpu"]
    monkeypatch.setattr("longtake.training.experiment.own_clips.BATCH", 1)
    assert main(["evaluate", "--checkpoints", "runs/own", *figures, "--report", "e.json", "--sheet", "e.png"]) == 0
    told = read_json(tmp_path / "e.json")
    assert told["nearest"]["of"] == 1 and told["nearest"]["clips"] == 7 and told["psnr_db"] > 5 and told["flow"] > 0
    assert (tmp_path / "e.png").is_file()
