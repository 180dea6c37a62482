"""A batch in N parts trains as the batch in one, and a step of N parts is one step of every schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.training.data.latent_cache import LatentCache, cache_from_dataset
from longtake.training.models.presets import Preset
from longtake.training.models.wan.window import full_history
from longtake.training.objective.accumulate import own_gradients, parts_of
from longtake.training.objective.error_recycling import RecyclingConfig
from longtake.training.objective.teacher_forcing import Clips, Noise, flow_loss
from longtake.training.optimizer import OptimizerConfig
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.stages.vae import VAEStage
from longtake.training.trainer import TrainConfig, Trainer, backward

CPU = torch.device("cpu")
ALWAYS = RecyclingConfig(capacity=3, clean=0.0, noise=0.5)
# SGD's size of step, as AdamW's first ones are the gradient's sign and would hide a wrong size.
PLAIN = OptimizerConfig(lr=1e-3, warmup=1, ema=0.9)


@pytest.fixture(autouse=True)
def encode_once(monkeypatch: pytest.MonkeyPatch, cached: dict[tuple[str, str], LatentCache]) -> None:
    def remembered(*args: Any, what: str, context: str, **kwargs: Any) -> LatentCache:
        if (what, context) not in cached:
            cached[what, context] = cache_from_dataset(*args, what=what, context=context, **kwargs)
        return cached[what, context]

    monkeypatch.setattr("longtake.training.stages.precompute.cache_from_dataset", remembered)
    monkeypatch.setattr("longtake.training.stages.transformer.CALIBRATION_BATCHES", 1)


@pytest.fixture(scope="module")
def cached() -> dict[tuple[str, str], LatentCache]:
    return {}


def options(preset: Preset, vae: Path, batch: int, parts: int, **more: Any) -> StageOptions:
    return StageOptions(preset, batch=batch, accumulate=parts, vae=vae, stories=4, chunks=(2,), seed=5, **more)


def gradients(chosen: StageOptions, device: torch.device = CPU) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step of stage "dit"."""
    stage = DiTStage(chosen)
    stage.prepare(device)
    run = Trainer(stage, TrainConfig(out=Path("nowhere"), preset="small", steps=4, seed=5), device)
    run.step = 1
    loss = backward(run.stage.losses(run.step - 1, run.generator))["loss"]
    named = {f"{o}/{n}": p.grad for o, m in stage.modules.items() for n, p in m.named_parameters()}
    return float(loss), {name: grad.clone() for name, grad in named.items() if grad is not None}


@pytest.mark.parametrize("more", [{}, {"i2v": 0.6, "context": "window"}], ids=["plain", "i2v, window"])
def test_parts_add_up_to_the_batch(small_preset: Preset, vae_folder: Path, more: dict[str, Any]) -> None:
    whole, wanted = gradients(options(small_preset, vae_folder, 4, 1, **more))
    for parts in (2, 4):
        loss, got = gradients(options(small_preset, vae_folder, 4 // parts, parts, **more))
        assert loss == pytest.approx(whole, rel=1e-5)
        assert got.keys() == wanted.keys() and len(wanted) > 20
        scale = max(float(grad.norm()) for grad in wanted.values())
        assert all(float((got[name] - wanted[name]).norm()) <= 1e-5 * scale for name in wanted)


def test_a_frame_weighs_the_same_in_every_part() -> None:
    """Parts with few frames that count must not count as much as the others."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 16, 2, 2, 2, generator=generator)
    given = torch.rand(4, 16, generator=generator) < torch.tensor([0.9, 0.1, 0.5, 0.0])[:, None]
    clips = Clips(latents, torch.zeros(4, 2, 3, dtype=torch.int32), full_history(2), given=given)
    noise = Noise(torch.randn(latents.shape, generator=generator), torch.rand(4, 2, 3, generator=generator))
    velocity = torch.randn(latents.shape, generator=generator)
    wanted = flow_loss(velocity, clips, noise)
    rows = velocity.split(2)
    parts = [(flow_loss(v, c, n), share) for v, (c, n, share) in zip(rows, parts_of(clips, noise, 2))]
    for which in (0, 1):
        torch.testing.assert_close(sum(loss[which] * share for loss, share in parts), wanted[which])
    halves = sum(loss[0] / 2 for loss, _ in parts)
    assert not torch.isclose(halves, wanted[0], rtol=1e-3)
    with pytest.raises(LongtakeError, match="equal parts"):
        list(parts_of(clips, noise, 3))


def run(out: Path, chosen: StageOptions, stage: type = DiTStage, **more: Any) -> dict[str, Tensor]:
    config = TrainConfig(
        out=out, preset="small", steps=3, seed=5, evaluate_steps=0, log_steps=1, optimizer=PLAIN, **more
    )
    Trainer(stage(chosen), config, CPU).fit()
    return load_file(sorted(out.glob("resume-*.safetensors"))[-1])


def test_schedules_count_steps_and_runs_resume(tmp_path: Path, small_preset: Preset, vae_folder: Path) -> None:
    chosen = options(small_preset, vae_folder, 1, 2, error_recycling=True, errors=ALWAYS)
    straight = run(tmp_path / "parts", chosen)
    run(tmp_path / "resumed", chosen, stop_at=1)
    resumed = run(tmp_path / "resumed", chosen, resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    counts = {float(x) for name, x in straight.items() if name.startswith("adamw/step/")}
    assert counts == {3.0}
    whole = run(tmp_path / "whole", options(small_preset, vae_folder, 2, 1, error_recycling=True, errors=ALWAYS))
    rates = [[row["lr"] for row in read_json(tmp_path / name / "loss.json")["train"]] for name in ("parts", "whole")]
    assert rates[0] == rates[1]
    flows = [[row["flow"] for row in read_json(tmp_path / name / "loss.json")["train"]] for name in ("parts", "whole")]
    assert flows[0] == pytest.approx(flows[1], rel=1e-3)
    assert straight["stage/latent/errors"].shape == whole["stage/latent/errors"].shape


def test_the_vae_learns_from_the_mean_of_its_parts(small_preset: Preset) -> None:
    stage = VAEStage(StageOptions(small_preset, batch=1, accumulate=2))
    stage.prepare(CPU)
    parts = [float(loss.detach()) for loss, _ in stage.losses(0, torch.Generator().manual_seed(1))]
    generator = torch.Generator().manual_seed(1)
    frames = stage.frames(generator)
    alone = [float(stage.clip_loss(frames, generator)[0].detach()) for _ in parts]
    assert parts == pytest.approx([loss / 2 for loss in alone]) and parts[0] != parts[1]


@pytest.mark.gpu
def test_parts_add_up_under_cuda_graphs(small_preset: Preset, vae_folder: Path) -> None:
    """A graph hands out its own buffers as gradients: those of the first part must survive the second's run."""
    cuda = torch.device("cuda")
    _, wanted = gradients(options(small_preset, vae_folder, 4, 1, graph=False, fp32=True), cuda)
    _, got = gradients(options(small_preset, vae_folder, 1, 4, graph=True, fp32=True), cuda)
    scale = max(float(grad.norm()) for grad in wanted.values())
    assert all(float((got[name] - wanted[name]).norm()) <= 1e-4 * scale for name in wanted)


def test_a_parameter_does_not_take_a_buffer_as_its_gradient() -> None:
    """What `own_gradients` is for, with a buffer of one's own in place of a CUDA graph's."""
    layer = torch.nn.Linear(2, 1, bias=False)
    own_gradients({"layer": layer})
    kept = layer.weight.grad
    for value in (1.0, 2.0):
        layer(torch.full((1, 2), value)).sum().backward()
    assert layer.weight.grad is kept and kept is not None and kept.tolist() == [[3.0, 3.0]]
