"""What recipes cost in prompt fidelity: stories told and told again through the runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.commands.main import main
from longtake.runtime.generator import Generator
from longtake.training.data.held_out_stories import returning_stories
from longtake.training.experiment import engine_fidelity
from longtake.training.experiment.classifier import DigitClassifier
from longtake.training.experiment.engine_fidelity import fidelity_of, measured, retold, told
from longtake.training.experiment.stories import scripts_of


class Sees(DigitClassifier):
    """Sees the digit that a frame's mean colour says."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        digits = ((frames.mean((1, 2, 3)) + 1) * 5).long().clamp(0, 9)
        return torch.nn.functional.one_hot(digits, 10).float()


def test_retold_from_its_own_latents_a_story_is_the_same(make_toy: Any, make_generator: Any) -> None:
    generator: Generator = make_generator(make_toy())
    (script,) = scripts_of(returning_stories(1, (1, 2, 1), 3), 0)
    assert script.cuts == (False, True, False, True)
    latents, frames = told(generator, script)
    for one, other in zip(retold(generator, script, latents), frames, strict=True):
        assert np.array_equal(one, other)
    changed = [latents[0] * 0.9, *latents[1:]]
    again = retold(generator, script, changed)
    assert np.array_equal(again[0], frames[0]) and not np.array_equal(again[1], frames[1])


def test_fidelity_counts_frames_with_the_prompted_digit() -> None:
    (story,) = returning_stories(1, (1, 1, 1), 4)
    digits = [shot.digit for shot in story.shots]
    right = [np.full((32, 8, 8, 3), int((digit + 0.5) * 25.5), np.uint8) for digit in digits]
    assert fidelity_of(Sees(), story, right) == 1.0
    right[1][:16] = int(((digits[1] + 1) % 10 + 0.5) * 25.5)
    assert fidelity_of(Sees(), story, right) == pytest.approx(1 - 0.5 / 3)


def test_the_command_compares_with_the_first(
    make_toy: Callable[[], Any], make_generator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    opened = []

    def from_engines(name: str, backend: str, device: object) -> Generator:
        opened.append(name)
        return make_generator(make_toy())  # type: ignore[no-any-return]

    monkeypatch.setattr(Generator, "from_engines", from_engines)
    monkeypatch.setattr(engine_fidelity, "judge_from", lambda path, device: Sees())
    path = tmp_path / "f.json"
    assert (
        main(["experiment", "engine-fidelity", "a", "b", "--stories", "2", "--chunks", "2", "--json", str(path)]) == 0
    )
    assert opened == ["a", "b"]
    rows = json.loads(path.read_text())["rows"]
    assert rows["b"]["difference"] == 0 and rows["b"]["ssim_lowest"] == 1 and "difference" not in rows["a"]
    assert "a " in capsys.readouterr().out


def test_without_something_to_compare_with_there_is_no_likeness(make_toy: Any, make_generator: Any) -> None:
    row, videos = measured(make_generator(make_toy()), Sees(), returning_stories(1, (1, 1, 1), 5), None, "toy")
    assert set(row) == {"fidelity", "fidelity_by_story"} and len(videos) == 1
