from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.signals import ended_by_signals
from longtake.training.data.latent_cache import LatentCache, cache_from_dataset
from longtake.training.models.checkpoint import load_into
from longtake.training.models.presets import Preset
from longtake.training.models.wan.linears import quantized_linears
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.objective.graphed import GraphedLoss
from longtake.training.optimizer import OptimizerConfig
from longtake.training.stages.base import Stage
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.trainer import TrainConfig, Trainer

CPU = torch.device("cpu")


class LineStage(Stage):
    """Fits y = 2x with noise; `fault(step)` may spoil a loss."""

    name = "line"

    def __init__(self, fault: Any = None) -> None:
        self.modules: dict[str, nn.Module] = {"line": nn.Linear(1, 1)}
        nn.init.zeros_(self.modules["line"].weight)
        self.fault = fault

    def prepare(self, device: torch.device) -> None: ...

    def losses(self, step: int, generator: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        x = torch.randn(16, 1, generator=generator)
        loss = (self.modules["line"](x) - 2 * x).square().mean()
        yield (self.fault(step, loss) if self.fault else loss), {"x": float(x.mean())}

    def evaluate(self) -> dict[str, float]:
        return {"loss": float((self.modules["line"].weight - 2).square())}

    def samples(self) -> Tensor | None:
        return torch.zeros(1, 9, 3, 4, 4, dtype=torch.uint8)

    def metadata(self) -> dict[str, dict[str, Any]]:
        return {"line": {"note": "hello"}}


def config(out: Path, steps: int, **more: Any) -> TrainConfig:
    return TrainConfig(out=out, preset="small", steps=steps, log_steps=2, **more)


def test_a_run_learns_and_leaves_checkpoint_curve_and_record(tmp_path: Path) -> None:
    fast = OptimizerConfig(lr=0.1, ema=0.9)
    metrics = Trainer(LineStage(), config(tmp_path, 200, optimizer=fast, command="longtake train ..."), CPU).fit()
    assert metrics["loss"] < 0.01
    meta = read_json(tmp_path / "line.json")
    assert meta["kind"] == "line" and meta["step"] == 200 and meta["note"] == "hello"
    assert meta["command"] == "longtake train ..." and meta["metrics"]["loss"] == metrics["loss"]
    curve = read_json(tmp_path / "loss.json")
    assert curve["train"][0]["loss"] > 100 * curve["train"][-1]["loss"] and curve["held_out"][-1]["step"] == 200
    assert (tmp_path / "loss.png").stat().st_size > 1000 and any((tmp_path / "tensorboard").iterdir())
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp") or p.name.startswith(".")]


def test_the_report_says_how_fast_the_steps_of_this_run_were(tmp_path: Path) -> None:
    trainer = Trainer(LineStage(), config(tmp_path, 30, stop_at=20), CPU)
    trainer.fit()
    report = read_json(tmp_path / "report.json")
    assert report["steps_per_s"] >= 20 / report["seconds"] * 0.9 and report["step"] == 20
    Trainer(
        LineStage(fault=lambda step, loss: (time.sleep(0.05), loss)[1]), config(tmp_path, 30, resume=True), CPU
    ).fit()
    assert 0 < read_json(tmp_path / "report.json")["steps_per_s"] <= 20  # ten steps of at least 0.05 s


def test_divergence_names_the_step_and_keeps_the_last_good_point(tmp_path: Path) -> None:
    stage = LineStage(fault=lambda step, loss: loss * float("nan") if step == 6 else loss)
    with pytest.raises(LongtakeError, match="step 7 is not finite") as caught:
        Trainer(stage, config(tmp_path, 20, save_steps=5), CPU).fit()
    assert "--lr" in str(caught.value)
    saved = load_file(tmp_path / "resume-0000005.safetensors")
    assert all(value.isfinite().all() for value in saved.values() if value.is_floating_point())
    assert not (tmp_path / "line.safetensors").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_finishes_the_step_and_saves_a_resume_point(tmp_path: Path, sent: signal.Signals) -> None:
    def interrupt(step: int, loss: Tensor) -> Tensor:
        if step == 3:
            os.kill(os.getpid(), sent)
        return loss

    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        Trainer(LineStage(fault=interrupt), config(tmp_path, 20), CPU).fit()
    assert read_json(tmp_path / "resume-0000004.json")["step"] == 4
    Trainer(LineStage(), config(tmp_path, 20, resume=True), CPU).fit()
    assert read_json(tmp_path / "line.json")["step"] == 20


def test_time_limit_ends_cleanly(tmp_path: Path) -> None:
    Trainer(LineStage(), config(tmp_path, 10_000, max_seconds=0.0), CPU).fit()
    assert read_json(tmp_path / "line.json")["step"] == 1


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="nothing to resume"):
        Trainer(LineStage(), config(tmp_path, 5, resume=True), CPU).fit()


def test_full_disk_is_seen_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    stage = LineStage(fault=lambda step, loss: pytest.fail("a step was taken"))
    with pytest.raises(LongtakeError, match="not enough disk space"):
        Trainer(stage, config(tmp_path, 5), CPU).fit()


def dit_run(
    out: Path, preset: Preset, vae: Path, precision: str, device: torch.device = CPU, **more: Any
) -> dict[str, Tensor]:
    """Train the small DiT; returns every tensor of the last resume point and of the checkpoints."""
    options = StageOptions(
        preset, batch=2, precision=precision, vae=vae, stories=3, chunks=(1, 2), recalibrate=2, seed=5, context="window"
    )
    run = TrainConfig(out=out, preset=preset.name, steps=6, seed=5, evaluate_steps=0, **more)
    Trainer(DiTStage(options), run, device).fit()
    files = [sorted(out.glob("resume-*.safetensors"))[-1], out / "dit.safetensors", out / "text_encoder.safetensors"]
    return {f"{f.stem if 'resume' not in f.stem else 'resume'}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.fixture
def encode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: dict[str, LatentCache] = {}

    def remembered(*args: Any, what: str, **kwargs: Any) -> LatentCache:
        if what not in caches:
            caches[what] = cache_from_dataset(*args, what=what, **kwargs)
        return caches[what]

    monkeypatch.setattr("longtake.training.stages.precompute.cache_from_dataset", remembered)


@pytest.mark.usefixtures("encode_once")
@pytest.mark.parametrize("precision", ["bf16", "nvfp4"])
def test_resumed_run_is_bit_identical(tmp_path: Path, small_preset: Preset, vae_folder: Path, precision: str) -> None:
    straight = dit_run(tmp_path / "a", small_preset, vae_folder, precision)
    dit_run(tmp_path / "b", small_preset, vae_folder, precision, stop_at=3)
    resumed = dit_run(tmp_path / "b", small_preset, vae_folder, precision, resume=True)
    assert straight.keys() == resumed.keys()
    different = [name for name in straight if not torch.equal(straight[name], resumed[name])]
    assert not different
    amax = read_json(tmp_path / "b" / "dit.json")["amax"]
    assert list(amax) == quantized_linears(DiTStage(StageOptions(small_preset)).dit)
    assert all(value > 0 for sides in amax.values() for value in sides.values())
    load_into(CausalVAE(small_preset.vae), tmp_path / "b" / "vae.safetensors", kind="vae", preset="small")


@pytest.mark.gpu
@pytest.mark.usefixtures("encode_once")
@pytest.mark.parametrize("precision", ["bf16", "nvfp4"])
def test_resumed_run_on_a_gpu_is_close(tmp_path: Path, small_preset: Preset, vae_folder: Path, precision: str) -> None:
    """On a GPU sums are in no fixed order: averaged weights agree to a relative L2 error of 1e-2."""
    gpu = torch.device("cuda")
    straight = dit_run(tmp_path / "a", small_preset, vae_folder, precision, gpu)
    dit_run(tmp_path / "b", small_preset, vae_folder, precision, gpu, stop_at=3)
    resumed = dit_run(tmp_path / "b", small_preset, vae_folder, precision, gpu, resume=True)
    one, other = (
        torch.cat([v.flatten() for k, v in run.items() if k.startswith("dit/")]) for run in (straight, resumed)
    )
    assert (one - other).norm() <= 1e-2 * one.norm()


@pytest.mark.gpu
def test_a_captured_loss_has_the_same_gradients() -> None:
    gpu = torch.device("cuda")
    linear = torch.nn.Linear(8, 8).to(gpu)

    def loss(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        error = linear(x).square().mean()
        return error, error

    graphed = GraphedLoss({"linear": linear}, loss, enabled=True)
    for _ in range(3):
        x = torch.randn(4, 8, device=gpu)
        (wanted,) = torch.autograd.grad(loss(x)[0], [linear.weight])
        linear.zero_grad()
        graphed(x)[0].backward()
        assert graphed.enabled
        assert torch.allclose(linear.weight.grad, wanted, rtol=1e-5, atol=1e-6)
