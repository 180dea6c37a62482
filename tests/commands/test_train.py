from __future__ import annotations

from pathlib import Path

import pytest

from longtake.commands.main import main
from longtake.training.options import chunk_choices, chunk_text


def train(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["train", "--device", "cpu", *words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out + captured.err


def test_dry_run_prints_sizes_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, text = train(capsys, "--stage", "dit", "--out", str(tmp_path / "run"), "--dry-run")
    assert code == 0 and "dit: 6," in text and "text_encoder:" in text and "nothing was trained" in text
    assert not (tmp_path / "run").exists()


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.count("longtake train --stage") >= 4 and "--resume" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "dit", "--resume"], "nothing to resume"),
        (["--stage", "dit", "--steps", "0"], "nothing to train"),
        (["--stage", "dit", "--batch", "0"], "bad batch size"),
        (["--stage", "dit", "--chunks", "6..4"], "bad --chunks"),
        (["--stage", "dit", "--max-chunks-per-shot", "-1"], "bad --max-chunks-per-shot"),
        (["--stage", "dit", "--lr", "-1"], "bad optimizer settings"),
        (["--stage", "dit", "--init", "/nowhere"], "does not exist"),
        (["--stage", "dit", "--vae", "/nowhere"], "does not exist"),
        (["--stage", "vae", "--data", "/nowhere"], "no such data set"),
        (["--stage", "dit", "--device", "cuda:63"], "is not there"),
        (["--stage", "dit", "--device", "abacus"], "unknown device"),
    ],
)
def test_bad_input_is_one_clear_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    code, text = train(capsys, "--out", str(tmp_path / "run"), *words)
    assert code != 0 and message in text and ("fix:" in text or "expected:" in text)
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize("command", ["train --stage dit", "distill --teacher tiny"])
def test_data_that_is_not_there_is_said_before_anything_heavy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    for name in ("train", "distill"):
        monkeypatch.setattr(f"longtake.commands.{name}.modelopt", lambda: pytest.fail("it was loaded"))
    assert main([*command.split(), "--data", "/nowhere", "--out", str(tmp_path / "run")]) == 2
    assert "no such data set" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "distill"])
def test_where_no_run_is_nothing_is_resumed(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    assert main([command, "--resume", "--out", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert f"nothing to resume in {tmp_path / 'none'}" in said and "check --out" in said and "lacks" not in said


def test_chunk_choices() -> None:
    assert chunk_choices("4..6") == (4, 5, 6) and chunk_choices("5") == (5,)
    assert chunk_choices("1,1,5") == (1, 1, 5)
    assert [chunk_text(chunk_choices(text)) for text in ("4..6", "5", "1,1,5")] == ["4..6", "5", "1,1,5"]


def test_a_distillation_is_described_without_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--teacher", str(tmp_path / "none"), "--out", str(tmp_path / "run"), "--student-steps", "2", "--dry-run"]
    assert main(["distill", *words]) == 0
    text = capsys.readouterr().out
    assert "the student's update (1 step in 5)" in text and "student: 2 steps, guidance 1; lr 0.0001" in text
    assert not (tmp_path / "run").exists()
