"""Distillation as a run: it learns, resumes bit by bit, and leaves a folder that the rest of the project takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_distillation import RATE, stage_of
from untrained import random_models

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.training.distill.lora import adapter_parameters, add_adapters, lora_layers, merged, use_adapter
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.stage import DistillStage
from longtake.training.distill.trainer import DistillTrainer
from longtake.training.models.load import load_models
from longtake.training.models.presets import Preset
from longtake.training.models.wan.linears import quantized_linears
from longtake.training.models.wan.window import full_history
from longtake.training.objective.teacher_forcing import Clips, Noise, predict_velocity
from longtake.training.trainer import TrainConfig

CPU = torch.device("cpu")


def trainer(
    preset: Preset, teacher: Path, out: Path, steps: int, resume: bool = False, **options: object
) -> DistillTrainer:
    config = TrainConfig(
        out=out,
        preset=preset.name,
        steps=4,
        optimizer=RATE,
        evaluate_steps=0,
        log_steps=1,
        stop_at=steps,
        resume=resume,
    )
    return DistillTrainer(stage_of(preset, teacher, **options), config, RATE, CPU)


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_rank": 4, "precision": "nvfp4", "gradient_checkpointing": True, "i2v": True}],
    ids=["all weights", "lora, nvfp4, i2v"],
)
def test_a_run_resumes_bit_by_bit(small_preset: Preset, teacher: Path, tmp_path: Path, options: dict) -> None:
    trainer(small_preset, teacher, tmp_path / "whole", 4, **options).fit()
    trainer(small_preset, teacher, tmp_path / "parts", 2, **options).fit()
    trainer(small_preset, teacher, tmp_path / "parts", 4, resume=True, **options).fit()
    whole, parts = (load_file(tmp_path / name / "dit.safetensors") for name in ("whole", "parts"))
    start = load_file(teacher / "dit.safetensors")
    assert whole.keys() == start.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert any(not torch.equal(whole[key], start[key]) for key in whole)
    side = read_json(tmp_path / "whole" / "dit.json")
    assert side["sampling"] == {"steps": 2, "guidance": 1.0, "shift": 5.0, "timesteps": [999, 833]}
    models = load_models(small_preset, tmp_path / "whole")
    assert set(models.amax) == set(quantized_linears(models.dit))
    assert (tmp_path / "whole" / "dit_lora.safetensors").is_file() == bool(options.get("lora_rank"))


def test_the_two_networks_do_not_touch_each_other(small_preset: Preset, teacher: Path, tmp_path: Path) -> None:
    run = trainer(small_preset, teacher, tmp_path, 4, lora_rank=4)
    run.prepare()
    run.step, run.bar = 1, None  # type: ignore[assignment]
    before = {name: value.clone() for name, value in run.stage.modules["dit"].state_dict().items()}  # type: ignore[attr-defined]
    loss, _ = next(run.distill.critic_losses(run.distill.scene(run.generator)))
    loss.backward()
    assert all(p.grad is None for p in run.distill.modules["dit"].parameters())
    assert any(p.grad is not None for p in run.distill.critic_modules["fake_score"].parameters())
    for p in run.distill.critic_modules["fake_score"].parameters():
        p.grad = None
    loss, _ = next(run.distill.generator_losses(run.distill.scene(run.generator)))
    loss.backward()
    assert all(p.grad is None for p in run.distill.critic_modules["fake_score"].parameters())
    assert any(p.grad is not None for p in run.distill.modules["dit"].parameters())
    after = run.distill.modules["dit"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@torch.no_grad()
def test_lora_sits_on_what_recipes_quantize_and_merges_exactly(small_preset: Preset) -> None:
    dit, plain = random_models(small_preset).dit.double(), random_models(small_preset).dit.double()
    add_adapters(dit, ("one", "two"), rank=4, alpha=8.0)
    names = [name for name, _ in lora_layers(dit)]
    assert sorted(names) == sorted(quantized_linears(plain)) and len(names) == 10 * small_preset.dit.layers
    assert len(adapter_parameters(dit, "one")) == 2 * len(names)
    for key, parameter in adapter_parameters(dit, "one").items():
        if "lora_B" in key:
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    use_adapter(dit, "one")
    clips, noise, text = inputs(small_preset)
    with_lora = predict_velocity(dit, small_preset, text, clips, noise)
    torch.testing.assert_close(
        predict_velocity(merged(dit, "one"), small_preset, text, clips, noise), with_lora, rtol=1e-5, atol=1e-5
    )
    base = predict_velocity(plain, small_preset, text, clips, noise)
    assert not torch.allclose(base, with_lora, atol=1e-3)
    for other in ("two", None):  # B is 0, or no adapter at all
        use_adapter(dit, other)
        torch.testing.assert_close(predict_velocity(dit, small_preset, text, clips, noise), base)


def inputs(preset: Preset) -> tuple[Clips, Noise, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, preset.dit.channels, *preset.latent_hw, generator=generator)
    clips = Clips(latents, torch.zeros(1, 2, 4, dtype=torch.int32), full_history(2), 2)
    noise = Noise(torch.randn(latents.shape, generator=generator), torch.full((1, 2, 3), 0.5))
    return clips, noise, torch.randn(1, 2, preset.text.length, preset.dit.text_dim, generator=generator)


def test_impossible_options_are_refused(small_preset: Preset, teacher: Path) -> None:
    with pytest.raises(LongtakeError, match="bad --critic-updates"):
        DistillOptions(small_preset, teacher=teacher, critic_updates=0)
    with pytest.raises(LongtakeError, match="bad number of denoise steps"):
        DistillOptions(small_preset, teacher=teacher, student_steps=0)
    with pytest.raises(LongtakeError, match="does not exist"):
        DistillStage(DistillOptions(small_preset, teacher=teacher / "nowhere"))
