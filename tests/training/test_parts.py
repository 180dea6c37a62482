"""A run in parts: what its record says, and what is refused before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.options import recorded
from longtake.paths import REPOSITORY
from longtake.training.models.checkpoint import save_checkpoint, side_file
from longtake.training.models.side_file import SideFile
from longtake.training.optimizer import OptimizerConfig
from longtake.training.parts import parts_before, source_of
from longtake.training.stages.base import Stage
from longtake.training.stages.options import StageOptions
from longtake.training.trainer import TrainConfig, Trainer

CPU = torch.device("cpu")
SHIPPED = REPOSITORY / "training/checkpoints/tiny"
BEFORE = StageOptions(data="returning-digits", chunks=(8, 20), return_distance=(3, 12), context="window", seed=1)


class Square(Stage):
    """A stage of one weight."""

    name = "dit"

    def __init__(self, options: StageOptions) -> None:
        self.options = options
        self.modules = {"dit": nn.Linear(1, 1, bias=False)}

    def prepare(self, device: torch.device) -> None:
        """Nothing to be prepared."""

    def losses(self, step: int, generator: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        yield self.modules["dit"](torch.ones(1, 1)).square().mean(), {}

    def evaluate(self) -> dict[str, float]:
        return {"loss": 0.0}

    def metadata(self) -> dict[str, dict[str, Any]]:
        return {"dit": {**recorded(self.options, "dit"), "precision": self.options.precision}}


def train(out: Path, options: StageOptions, steps: int) -> None:
    """As `longtake train` does."""
    optimizer = OptimizerConfig(warmup=2)
    parts = parts_before("dit", options, optimizer)
    config = TrainConfig(
        out=out, preset="tiny", steps=steps, seed=options.seed, evaluate_steps=0, optimizer=optimizer, parts=parts,
        source=source_of("dit", options.init), command=f"into {out.name}",
    )  # fmt: skip
    Trainer(Square(options), config, CPU).fit()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a first part."""
    out = tmp_path_factory.mktemp("parts") / "first"
    train(out, BEFORE, 30)
    return out


def test_the_record_says_what_each_part_was(first: Path, tmp_path: Path) -> None:
    later = replace(BEFORE, continued=True, seed=2)
    train(tmp_path / "second", replace(later, init=first), 20)
    train(tmp_path / "third", replace(later, init=tmp_path / "second", seed=3), 10)
    parts = read_json(tmp_path / "third" / "dit.json")["parts"]
    assert [part["steps"] for part in parts] == [30, 20, 10] and [part["seed"] for part in parts] == [1, 2, 3]
    assert [part["number"] for part in parts] == [1, 2, 3] and all(part["seconds"] >= 0 for part in parts)
    assert [part["optimizer"] for part in parts] == [f"new, {n} steps of warm-up" for n in (2, 2, 1)]
    assert parts[0]["from"] is None and parts[2]["command"] == "into third"
    for part, folder in zip(parts[1:], (first, tmp_path / "second")):
        assert part["from"] == {"folder": folder.name, "sha256": read_json(folder / "dit.json")["sha256"]}
    assert read_json(tmp_path / "third" / "report.json")["parts"] == parts


def test_a_run_that_only_starts_from_weights_is_a_first_part(first: Path, tmp_path: Path) -> None:
    train(tmp_path / "new", replace(BEFORE, init=first), 4)
    (only,) = read_json(tmp_path / "new" / "dit.json")["parts"]
    assert only["steps"] == 4 and only["from"]["folder"] == "first"


def test_a_checkpoint_from_before_the_record_is_one_part() -> None:
    side = SideFile.read(SHIPPED / "dit.json")
    options = StageOptions(
        data="digits", chunks=tuple(side.facts["chunks"]), context="window", precision="nvfp4", init=SHIPPED, seed=9,
        continued=True,
    )  # fmt: skip
    (part,) = parts_before("dit", options, OptimizerConfig())
    assert part["steps"] == 10254 and part["seed"] == 4 and part["seconds"] == 472.5


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"chunks": (8, 24)}, "chunks"),
        ({"data": "digits", "return_distance": None}, "data"),
        ({"return_distance": (3, 10)}, "return-distance"),
        ({"return_distance": None}, "return-distance"),
        ({"context": "full"}, "context"),
        ({"precision": "nvfp4"}, "precision"),
    ],
)
def test_other_data_or_lengths_are_another_run(first: Path, change: dict[str, Any], name: str) -> None:
    options = replace(BEFORE, continued=True, init=first, seed=2, **change)
    with pytest.raises(LongtakeError, match=f"data and lengths of the part before, and its --{name} differs") as error:
        parts_before("dit", options, OptimizerConfig())
    assert "leave --continued out" in str(error.value)
    assert parts_before("dit", replace(options, continued=False), OptimizerConfig()) == ()


def test_what_may_change_between_parts(first: Path) -> None:
    options = replace(BEFORE, continued=True, init=first, seed=2, batch=3, stories=9, text_dropout=0.2)
    assert len(parts_before("dit", options, OptimizerConfig(lr=1e-5))) == 1


def test_the_seed_of_an_earlier_part_and_no_warm_up_are_refused(first: Path) -> None:
    options = replace(BEFORE, continued=True, init=first)
    with pytest.raises(LongtakeError, match="would draw the same stories and noise again") as error:
        parts_before("dit", options, OptimizerConfig())
    assert "--seed 2" in str(error.value)
    with pytest.raises(LongtakeError, match="needs a warm-up"):
        parts_before("dit", replace(options, seed=2), OptimizerConfig(warmup=0))


def test_nothing_to_continue(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="nothing to continue") as error:
        parts_before("dit", replace(BEFORE, continued=True), OptimizerConfig())
    assert "--continued without --init" in str(error.value)
    with pytest.raises(LongtakeError, match="nothing to continue: no"):
        parts_before("dit", replace(BEFORE, continued=True, init=tmp_path), OptimizerConfig())
    save_checkpoint(tmp_path / "dit.safetensors", {"x": torch.zeros(1)}, SideFile("dit", "tiny"))
    assert side_file(tmp_path / "dit.safetensors").is_file()
    with pytest.raises(LongtakeError, match="doesn't say what it was trained on"):
        parts_before("dit", replace(BEFORE, continued=True, init=tmp_path), OptimizerConfig())


@pytest.mark.slow
def test_two_parts_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--data", "returning-digits", "--return-distance", "1..2", "--chunks", "3", "--stories", "2", "--batch", "1",
            "--steps", "2", "--context", "window", "--evaluate-steps", "0", "--save-dtype", "bf16", "--device", "cpu"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", "--stage", "dit", "--init", str(SHIPPED), *told, "--out", str(one)]) == 0
    again = ["train", "--stage", "dit", "--init", str(one), "--continued", "--seed", "1", *told, "--out", str(two)]
    assert main([*again, "--chunks", "4"]) == 2
    assert "its --chunks differs" in capsys.readouterr().err and not two.exists()
    assert main(again) == 0
    assert "part 2 of a run that made 2 steps before: a new optimizer" in capsys.readouterr().out
    side = read_json(two / "dit.json")
    assert [part["seed"] for part in side["parts"]] == [0, 1] and side["return_distance"] == [1, 2]
    small = sum(path.stat().st_size for name in ("dit", "text_encoder") for path in two.glob(f"{name}.*"))
    assert small < 25e6
    before, after = (load_file(folder / "dit.safetensors")["head.head.weight"] for folder in (one, two))
    assert not torch.equal(before, after)
