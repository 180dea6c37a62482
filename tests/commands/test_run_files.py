from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longtake.commands import main as main_cli
from longtake.commands.main import main
from longtake.commands.run_files import RUNS, run_names
from longtake.files import read_json
from longtake.paths import REPOSITORY
from longtake.training.models.presets import PRESETS, TINY
from longtake.training.optimizer import OptimizerConfig


def parsed(*words: str) -> SimpleNamespace:
    """What `longtake train WORDS` would train with: all its options, by field."""
    given = main_cli.parsed("train", list(words))
    return SimpleNamespace(**{key: value for options in given for key, value in vars(options).items()})


def optimizer_of(*words: str) -> OptimizerConfig:
    return next(given for given in main_cli.parsed("train", list(words)) if isinstance(given, OptimizerConfig))


def run_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_run_file_and_that_over_defaults(tmp_path: Path) -> None:
    text = "stage: dit\nout: runs/x\nlr: 1e-4\nbetas: [0, 0.999]\nfp32: true\nchunks: 5\ndescription: mine\n"
    for words in (
        ["--config", run_file(tmp_path, text), "--lr", "3"],
        ["--lr", "3", "--config", run_file(tmp_path, text)],
    ):
        args = parsed(*words)
        assert (args.stage, args.lr, args.betas, args.fp32, args.chunks) == ("dit", 3.0, (0.0, 0.999), True, (5,))
        assert args.out == Path("runs/x") and args.batch == 8 and args.cpu_bf16 is False


def test_without_a_run_file_everything_is_as_it_was() -> None:
    args = parsed("--stage", "vae", "--out", "runs/x", "--lr", "0.001")  # given, though it is the default
    assert (args.steps, args.seed, args.ema, args.chunks, args.context) == (1000, 0, 0.999, (4, 5, 6), "full")
    assert args.betas == (0.9, 0.99) and args.init is None and not args.resume


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: dit\nlearning_rate: 1\n", "unknown key in run file mine.yaml"),
        ("stage: dit\nbatsh: 1\n", "did you mean 'batch'"),
        ("stage: dot\n", "bad stage"),
        ("steps: many\n", "whole number"),
        ("steps: true\n", "whole number"),
        ("fp32: 1\n", "true or false"),
        ("betas: 0.9\n", "a list of 2"),
        ("- stage\n", "not a mapping"),
        ("stage: [\n", "not valid YAML"),
        ("out: x\n", "lacks --stage"),
        ("stage: dit\n", "lacks --out"),
        ("config: other\n", "unknown key"),
    ],
)
def test_bad_run_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    assert main(["train", "--config", run_file(tmp_path, text)]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and ("fix:" in said or "expected:" in said)


def test_an_unknown_name_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "tiny_step1_va"]) == 2
    assert "did you mean 'tiny_step1_vae'" in capsys.readouterr().err


@pytest.mark.parametrize("name", run_names(RUNS / "train"))
def test_shipped_run_files_are_valid(name: str) -> None:
    args = parsed("--config", name)
    assert args.preset.name in name and args.precision in (*name.split("_"), "bf16")


def test_the_tiny_run_files_are_the_documented_steps() -> None:
    """Each command in the checkpoints' README parses to what its run file does, up to where it stops and writes."""
    readme = (REPOSITORY / "training" / "checkpoints" / "tiny" / "README.md").read_text()
    commands = [line.strip().strip("`") for line in readme.splitlines() if line.strip().startswith("`longtake train")]
    names = [name for name in run_names(RUNS / "train") if name.startswith("tiny_step") and "step6" not in name]
    assert len(commands) == len(names) == 6
    for command, name in zip(commands, names):
        wanted, found = (parsed(*words) for words in (shlex.split(command)[2:], ["--config", name]))
        free = {"out", "stop_at", "max_seconds", "told"}
        different = {key for key in vars(wanted) if key not in free and getattr(wanted, key) != getattr(found, key)}
        assert not different, f"{name}: {different}"


def test_the_5b_run_file_is_the_references_ar_stage() -> None:
    expected: dict[str, dict[str, Any]] = {
        "bf16": {"chunks": (12,)},
        "nvfp4": {"chunks": (48,), "max_chunks_per_shot": 4},
    }
    for precision, own in expected.items():
        args = parsed("--config", f"wan2.2-ti2v-5b_{precision}_ar")
        optimizer = optimizer_of("--config", f"wan2.2-ti2v-5b_{precision}_ar")
        assert (optimizer.lr, optimizer.betas, optimizer.clip, optimizer.ema) == (1e-5, (0.0, 0.999), 10.0, 0.99)
        assert [optimizer.lr_at(step, 600) for step in (0, 300, 599)] == pytest.approx([1e-5] * 3)
        assert args.steps == 600 and args.precision == precision
        assert {key: getattr(args, key) for key in own} == own


def test_training_from_a_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(TINY, vae=replace(TINY.vae, encoder_dim=8, decoder_dim=8), name="small", height=32, width=32)
    monkeypatch.setitem(PRESETS, "small", small)
    text = f"stage: vae\npreset: small\nout: {tmp_path / 'run'}\nsteps: 1\nbatch: 1\ndevice: cpu\n"
    assert main(["train", "--config", run_file(tmp_path, text)]) == 0
    settings = read_json(tmp_path / "run" / "resume-0000001.json")["settings"]
    assert settings["stage"] == "vae" and settings["batch"] == 1 and "out" not in settings


def test_the_old_name_is_refused_with_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "distill"):
        assert main([command, "--recipe", "tiny_step1_vae"]) == 2
        assert "it is called --config now" in capsys.readouterr().err
