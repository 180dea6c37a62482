"""The command: a plan, settings, stopping and going on, what a report says; at toy size from end to end (slow)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from untrained import random_models

from longtake.commands.main import main as longtake
from longtake.errors import LongtakeError
from longtake.record import record_from_json
from longtake.training.experiment.batched import Rollout, Sampling, Script
from longtake.training.experiment.classifier import JudgeTraining, trained_judge
from longtake.training.experiment.cli import prepare, spent
from longtake.training.experiment.report import BEGIN, END, fill, write_report
from longtake.training.experiment.settings import Settings, quick
from longtake.training.experiment.summary import claims, paired_interval, summary
from longtake.training.experiment.units import units
from longtake.training.models.presets import Preset

CPU = torch.device("cpu")


def outcome(flow: float, fidelity: float) -> dict[str, float]:
    return {"flow": flow, "fidelity": fidelity}


def test_plan_fits_the_time_it_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert longtake(["experiment", "--plan", "--out", str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "this call stops after 1500 s" in said and "start: shipped" in said
    assert sum(unit.seconds for unit in units(Settings())) < 60 * 60
    names = [unit.name for unit in units(Settings())]
    assert len(set(names)) == len(names) and {"train-nvfp4-2", "sinks-none-0", "drift-ptq-1", "student-2"} <= set(names)
    for number, unit in enumerate(units(Settings())):
        assert set(unit.needs) <= set(names) and unit.seconds > 0, number


def test_another_experiment_in_the_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prepare(quick(Settings()), tmp_path, resume=False)
    assert longtake(["experiment", "--quick", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "--resume, or another --out" in capsys.readouterr().err
    assert (
        longtake(
            [
                "experiment",
                "--quick",
                "--out",
                str(tmp_path),
                "--resume",
                "--seeds",
                "2",
                "--branch-steps",
                "9",
                "--device",
                "cpu",
            ]
        )
        == 1
    )
    assert "branch_steps 2" in capsys.readouterr().err
    assert longtake(["experiment", "--start", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1


def results_of(ptq: list[float], aware: list[float]) -> dict[str, dict[str, float]]:
    made = {}
    for seed, (a, b) in enumerate(zip(ptq, aware)):
        made |= {f"eval-ptq-{seed}": outcome(a, 0.5), f"eval-nvfp4-{seed}": outcome(b, 0.9)}
        made |= {f"eval-bf16-{seed}": outcome(0.1, 0.9), f"eval-bf16-fp4cache-{seed}": outcome(0.1, 0.89)}
    return made


def test_a_claim_holds_only_beyond_the_spread() -> None:
    name = "NVFP4-aware has a lower held-out flow loss than post-training NVFP4"
    settings = Settings()
    clear = claims(results_of([0.30, 0.31, 0.32], [0.20, 0.21, 0.22]), settings)[name]
    assert clear["holds"] and clear["difference"] == pytest.approx(0.1) and clear["spread"] == pytest.approx(0.01)
    assert not claims(results_of([0.2, 0.3, 0.4], [0.19, 0.29, 0.39]), settings)[name]["holds"]
    part = results_of([0.30, 0.31, 0.32], [0.20, 0.21, 0.22])
    del part["eval-ptq-2"]
    assert claims(part, settings)[name]["seeds"] == 2 and claims(part, settings)[name]["holds"]
    assert claims(results_of([0.3], [0.2]), settings)[name]["holds"] is None  # one seed has no spread
    assert claims({}, settings)[name]["holds"] is None
    found = summary(results_of([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]), settings)["eval"]
    assert found["ptq"]["flow"]["mean"] == 2.0 and found["ptq"]["flow"]["values"] == [1.0, 2.0, 3.0]
    assert found["bf16"]["flow"]["spread"] == 0.0 and found["bf16-fp4cache"]["fidelity"]["mean"] == pytest.approx(0.89)


def test_interval_is_over_stories_that_both_have() -> None:
    high = [[0.5, 0.7, 0.9, 0.6], [0.5, 0.9, 0.9, 0.6]]
    low = [[0.4, 0.6, 0.8, 0.5], [0.4, 0.8, 0.8, 0.5]]
    assert paired_interval(high, low) == pytest.approx([0.1, 0.1])  # each story differs by 0.1
    least, most = paired_interval([[1.0, 0.0] * 50], [[0.0, 0.0] * 50])  # type: ignore[misc]
    assert 0.35 < least < 0.5 < most < 0.65
    assert paired_interval([], []) is None and paired_interval([[1.0]], [[1.0, 2.0]]) is None


def test_a_report_alone_is_not_time_spent(tmp_path: Path) -> None:
    assert spent(tmp_path, "2 x H100", 100.0, True) == ("2 x H100", 100.0)
    assert spent(tmp_path, "CPU", 5.0, False) == ("2 x H100", 100.0)
    assert spent(tmp_path, "CPU", 5.0, True) == ("2 x H100 and CPU", 105.0)


def test_what_has_no_room_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["experiment", "--device", "cpu", "--plan", "--out", str(tmp_path / "out")]
    for words, message in (
        (["--return-distance", "7..9"], "too short for a subject to return"),
        (["--distill-rollout", "3..6"], "roll-out is shorter than what they learn on"),
        (["--chunks", "8,16", "--return-distance", "3..9", "--distill-rollout", "4"], "too short for a subject"),
    ):
        assert longtake([*told, *words]) != 0 and message in capsys.readouterr().err, words
    assert not (tmp_path / "out").exists()
    far = ["--chunks", "8,16", "--return-distance", "3..9", "--distill-rollout", "8..16", "--batch", "5"]
    assert longtake([*told, *far]) == 0
    kept = record_from_json(Settings, json.loads((tmp_path / "out" / "settings.json").read_text()))
    assert kept.return_distance == (3, 9) and kept.distill_rollout == tuple(range(8, 17)) and kept.batch == 5


def test_settings_survive_json() -> None:
    assert record_from_json(Settings, json.loads(json.dumps(Settings().as_json()))) == Settings()


def test_student_is_held_against_its_own_teacher() -> None:
    results, best = results_of([0.3] * 3, [0.20, 0.19, 0.22]), Settings(teacher="best")
    results["eval-nvfp4-1"]["fidelity"] = 0.8
    name = "the 4-step student is within 5 points of its teacher's prompt fidelity"
    assert claims({**results, "student-4": {"fidelity": 0.76}}, best)[name]["holds"]
    assert not claims({**results, "student-4": {"fidelity": 0.74}}, best)[name]["holds"]
    assert claims({**results, "student-4": {"fidelity": 0.86}}, Settings())[name]["teacher"] == 0.9  # of the first seed


def test_report_fills_a_page_twice(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):
        text = write_report(
            results_of([0.3, 0.4], [0.2, 0.3]), Settings(), out, "CPU", {"sheet": "the time was over"}, page
        )
    filled = page.read_text()
    assert filled.startswith("before\n") and filled.endswith("after\n") and "stale" not in filled
    assert filled.count("| NVFP4-aware | 0.2500 ± 0.0707 |") == 1 and "0.2500 ± 0.0707" in text
    assert "![arms](page/arms.png)" in filled and (tmp_path / "page" / "arms.png").is_file()
    result = json.loads((out / "results.json").read_text())
    assert result["kind"] == "experiment" and not result["complete"] and "sheet: the time was over" in filled
    page.write_text("no marks")
    with pytest.raises(LongtakeError, match="no place for results"):
        fill(page, text, out)


def test_judge_is_the_same_on_every_run(small_preset: Preset) -> None:
    from longtake.training.models.wan.vae import CausalVAE

    torch.manual_seed(3)
    vae = CausalVAE(small_preset.vae).eval()
    first, second = (trained_judge(vae, small_preset, JudgeTraining(steps=2, batch=2), CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.slow
@pytest.mark.timeout(1500)  # 25 units start a process each, and share the cores with other tests
def test_everything_at_toy_size(tmp_path: Path) -> None:
    arguments = ["--quick", "--devices", "cpu,cpu", "--bring", str(tmp_path / "away")]
    first, second = tmp_path / "first", tmp_path / "second"
    assert longtake(["experiment", *arguments, "--out", str(first), "--budget-seconds", "20"]) == 3
    partial = json.loads((first / "results.json").read_text())
    assert "sheet" in partial["missing"] and not partial["complete"]
    # On another machine, from what was brought away.
    assert longtake(["experiment", *arguments, "--out", str(second), "--restore", str(tmp_path / "away")]) == 0
    result = json.loads((second / "results.json").read_text())
    assert {unit.name for unit in units(quick(Settings())) if not unit.step} <= set(result["units"])
    assert result["complete"] and result["toy_size"]
    assert result["units"]["eval-ptq-0"]["flow"] != result["units"]["eval-bf16-0"]["flow"]
    for name in ("sheet.png", "sheet.mp4", "drift.png"):
        assert (second / name).is_file()
    assert not list(second.glob("arms/*/resume-*"))
    assert {path.name for path in (tmp_path / "away").iterdir()} >= {"report.tar", "state.tar", "model-students-4.tar"}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1500)  # as above
def test_everything_at_toy_size_on_a_gpu(tmp_path: Path) -> None:
    arguments = ["--quick", "--devices", "cuda:0", "--jobs-per-device", "3", "--out", str(tmp_path)]
    assert longtake(["experiment", *arguments, "--budget-seconds", "1200"]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["complete"] and "distill-4" in result["units"]
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert "without CUDA graphs" not in logs and "slower codec" not in logs


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu(small_preset: Preset) -> None:
    scripts = [Script(("a red two rises over a grey background, soft light",) * 6, (False,) * 3 + (True,) + (False,) * 2, s) for s in range(3)]  # fmt: skip
    sampling = Sampling(steps=2, guidance=2.0, cache="nvfp4")
    plain = random_models(small_preset, seed=1)
    slow = torch.cat(list(Rollout(plain, scripts, sampling, CPU)), 1)
    fast = replace(plain, dit=plain.dit.cuda(), text=plain.text.cuda(), vae=plain.vae.cuda())
    got = torch.cat(list(Rollout(fast, scripts, sampling, torch.device("cuda"))), 1).cpu()
    assert torch.cosine_similarity(got.flatten(1), slow.flatten(1)).min() > 0.99
