"""The shipped judge, and `longtake evaluate`. What it says of own clips is tested with docs/training.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.commands.evaluate import JUDGE
from longtake.commands.main import main
from longtake.files import read_json, sha256
from longtake.training.experiment.classifier import DigitClassifier, drawn
from longtake.training.experiment.evaluate import judge_from
from longtake.training.models.checkpoint import side_file

CPU = torch.device("cpu")


def test_the_judge_is_small_and_the_one_that_its_side_file_tells_of() -> None:
    told = read_json(side_file(JUDGE))
    assert JUDGE.stat().st_size < 1_000_000 and told["sha256"] == sha256(JUDGE)
    judge = judge_from(JUDGE, CPU)
    assert isinstance(judge, DigitClassifier) and judge(torch.zeros(1, 3, 128, 128)).shape == (1, 10)
    assert told["accuracy"]["rendered"] > 0.95 and told["accuracy"]["through_vae"] > 0.89


def test_clips_of_a_pool_are_rolled_together() -> None:
    pool = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
    rendered, through, digits = drawn(pool, 6, torch.Generator().manual_seed(3))
    for frame, other, digit in zip(rendered, through, digits.tolist()):
        (shift,) = [
            s for y in range(8) for x in range(8) if torch.equal(frame, pool[0][digit].roll((s := (y, x)), (1, 2)))
        ]
        assert torch.equal(other, pool[1][digit].roll(shift, (1, 2)))


def test_what_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--checkpoints", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shipped_model_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--clips",
        "2",
        "--stories",
        "2",
        "--prompts",
        "4",
        "--device",
        "cpu",
        "--report",
        str(tmp_path / "e.json"),
    ]
    assert main(["evaluate", "--checkpoints", "tiny-4step", *words]) == 0
    told = read_json(tmp_path / "e.json")
    assert told["psnr_db"] > 28 and 0 < told["flow"] < 0.5 and told["fidelity"] > 0.4  # of four videos; chance is 0.1
    assert "the judge sees the prompted digit" in capsys.readouterr().out


def test_data_that_is_none_is_refused_before_the_models_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("models were loaded")

    monkeypatch.setattr("longtake.commands.evaluate.load_models", loaded)
    assert main(["evaluate", "--checkpoints", "tiny", "--data", "nothing", "--device", "cpu"]) == 2
    assert "no such data set" in capsys.readouterr().err
