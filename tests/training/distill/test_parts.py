"""Distillation in parts, from caches on disk, and on a GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_distillation import RATE, stage_of
from torch import Tensor
from untrained import random_models

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.rollout import Rollout, Story
from longtake.training.distill.scene import Scene
from longtake.training.distill.scores import GraphedScorer
from longtake.training.distill.stage import DistillStage
from longtake.training.distill.trainer import DistillTrainer
from longtake.training.models.load import load_models
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import TextEncoder
from longtake.training.models.wan.linears import quantized_linears
from longtake.training.objective.chunk_pass import GraphedChunkPass
from longtake.training.trainer import TrainConfig, backward

CPU = torch.device("cpu")
EVERYTHING: dict[str, Any] = {
    "lora_rank": 4,
    "precision": "nvfp4",
    "gradient_checkpointing": True,
    "i2v": True,
    "accumulate": 2,
}


def gradients(stage: DistillStage, device: torch.device = CPU) -> dict[str, Tensor]:
    """Of the generator's update and of the critic's, on a scene of the stage's own."""
    stage.prepare(device)
    return gradients_of(stage, stage.scene(torch.Generator().manual_seed(3)))


def gradients_of(stage: DistillStage, scene: Scene) -> dict[str, Tensor]:
    """Losses and gradients of both networks, from one scene."""
    found: dict[str, Tensor] = {}
    for name, losses, modules in (
        ("generator", stage.generator_losses, stage.modules),
        ("critic", stage.critic_losses, stage.critic_modules),
    ):
        found[f"{name} loss"] = torch.as_tensor(backward(losses(scene))["loss"])
        for owner, module in modules.items():
            found |= {f"{name} {owner}/{n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return found


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of a tensor, in units of the largest gradient of its network."""
    assert one.keys() == other.keys() and len(one) > 20
    ratios = []
    for network in ("generator", "critic"):
        names = [name for name in one if name.startswith(network) and "loss" not in name]
        scale = max(float(one[name].norm()) for name in names)
        ratios += [float((one[name] - other[name]).norm()) / scale for name in names]
        ratios.append(float((one[f"{network} loss"] / other[f"{network} loss"] - 1).abs()))
    return max(ratios)


@pytest.mark.parametrize("i2v", [False, True], ids=["text", "picture"])
def test_parts_add_up_to_the_batch(small_preset: Preset, teacher: Path, i2v: bool) -> None:
    """Both networks' gradients; the cache unquantized, whose rounding would make steps of the smallest differences."""
    same: dict[str, Any] = {"cache": "bf16", "i2v": i2v}
    whole = gradients(stage_of(small_preset, teacher, batch=4, **same))
    assert worst(whole, gradients(stage_of(small_preset, teacher, batch=1, accumulate=4, **same))) <= 1e-5


def test_a_second_run_encodes_neither_stories_nor_prompts(
    tmp_path: Path, small_preset: Preset, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients(stage_of(small_preset, teacher))
    cached = gradients(stage_of(small_preset, teacher, cache_dir=tmp_path))
    assert len(list(tmp_path.glob("text/*/*.safetensors"))) == 1 and list(tmp_path.glob("latents/*/*.safetensors"))

    def never(self: TextEncoder, tokens: Tensor) -> Tensor:
        raise AssertionError("the text encoder was called")

    monkeypatch.setattr(TextEncoder, "forward", never)
    again = gradients(stage_of(small_preset, teacher, cache_dir=tmp_path))
    assert worst(cached, again) == 0.0 and cached.keys() == plain.keys()
    with pytest.raises(AssertionError, match="was called"):
        gradients(stage_of(small_preset, teacher, cache_dir=tmp_path, seed=5))


def test_where_nothing_can_be_captured_passes_run_by_themselves(
    small_preset: Preset, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = gradients(stage_of(small_preset, teacher))
    stage = stage_of(small_preset, teacher)
    stage.prepare(CPU)
    stage.capture()
    again = gradients_of(stage, stage.scene(torch.Generator().manual_seed(3)))
    assert worst(plain, again) == 0.0
    if not torch.cuda.is_available():
        assert "without CUDA graphs" in caplog.text


def story(preset: Preset, device: torch.device, chunks: int = 6) -> Story:
    """Two stories with cuts in different places."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, chunks, preset.text.length, preset.dit.text_dim, generator=generator)
    noise = torch.randn(
        2, chunks * preset.chunk_latents, preset.dit.channels, *preset.latent_hw, generator=generator
    )  # fmt: skip
    cuts = [[False, False, True, False, False, True], [False, True, False, False, False, False]]
    return Story(text.to(device), cuts, noise.to(device))


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_s_rollout_is_the_cpu_s(small_preset: Preset) -> None:
    """In fp32 the same; with 4-bit keys and values, and in bf16, about so. Six chunks: the window moves on."""
    dit, gpu = random_models(small_preset, seed=1).dit, torch.device("cuda")
    wanted = Rollout(small_preset, 2, "bf16")(dit, story(small_preset, CPU), 1)
    rounded = Rollout(small_preset, 2, "nvfp4")(dit, story(small_preset, CPU), 1)
    dit.to(gpu)
    got = Rollout(small_preset, 2, "bf16")(dit, story(small_preset, gpu), 1).cpu()
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()
    four_bits = Rollout(small_preset, 2, "nvfp4")(dit, story(small_preset, gpu), 1).cpu()
    assert (four_bits - rounded).norm() <= 3e-2 * rounded.norm()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        half = Rollout(small_preset, 2, "bf16")(dit, story(small_preset, gpu), 1).cpu()
    assert half.dtype == torch.float32 and (half - wanted).norm() <= 5e-2 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_on_a_gpu_recomputed_blocks_have_the_same_gradients(small_preset: Preset, bf16: bool) -> None:
    gpu, found = torch.device("cuda"), []
    for checkpointing in (False, True):
        dit = random_models(small_preset, seed=1).dit.to(gpu)
        dit.checkpointing = checkpointing
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
            video = Rollout(small_preset, 2, "nvfp4")(dit, story(small_preset, gpu), 1, gradient=True)
        video.square().mean().backward()
        found.append({name: p.grad for name, p in dit.named_parameters() if p.grad is not None})
    scale = max(float(grad.norm()) for grad in found[0].values())
    assert all(float((found[0][n] - found[1][n]).norm()) <= 1e-3 * scale for n in found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["all weights", "everything"])
def test_distillation_on_a_gpu(tmp_path: Path, small_preset: Preset, teacher: Path, options: dict[str, Any]) -> None:
    """Through the trainer, with ModelOpt's own kernels where they run; stopped once, and gone on with."""
    gpu = torch.device("cuda")
    for more in ({"stop_at": 2}, {"resume": True}):
        stage = stage_of(small_preset, teacher, cache_dir=tmp_path / "cache", **options)
        config = TrainConfig(
            out=tmp_path / "run",
            preset=small_preset.name,
            steps=4,
            optimizer=RATE,
            evaluate_steps=0,
            log_steps=1,
            **more,
        )
        metrics = DistillTrainer(stage, config, RATE, gpu).fit()
        assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    trained, start = (load_file(folder / "dit.safetensors") for folder in (tmp_path / "run", teacher))
    assert trained.keys() == start.keys() and any(not torch.equal(trained[key], start[key]) for key in start)
    models = load_models(small_preset, tmp_path / "run")
    assert set(models.amax) == set(quantized_linears(models.dit))
    assert read_json(tmp_path / "run" / "dit.json")["sampling"]["steps"] == 2
    assert stage.cached_text is not None and stage.cached_text.resident


@pytest.mark.gpu
def test_a_gpu_s_gradients_are_the_cpu_s(small_preset: Preset, teacher: Path) -> None:
    """One scene drawn on each device would differ, so the CPU's is moved over. fp32, unquantized cache."""
    gpu, found = torch.device("cuda"), []
    for device in (CPU, gpu):
        stage = stage_of(small_preset, teacher, cache="bf16", fp32=True)
        stage.prepare(device)
        host = torch.Generator().manual_seed(4)
        scene = stage.scenes.of(torch.tensor([0, 1]), 2, 1, host)
        noise = stage.score_noise(scene, host)
        loss, _ = stage.generator_loss(scene, noise)
        loss.backward()
        critic, _ = stage.critic_loss(scene, noise)
        critic.backward()
        modules = {"generator": stage.modules["dit"], "critic": stage.critic_modules["fake_score"]}
        own = {
            f"{o} {n}": p.grad.cpu() for o, m in modules.items() for n, p in m.named_parameters() if p.grad is not None
        }
        found.append({**own, "generator loss": loss.detach().cpu(), "critic loss": critic.detach().cpu()})
    assert worst(*found) <= 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"fp32": True, "cache": "bf16"}, {"precision": "nvfp4", "cache": "nvfp4"}], ids=["fp32", "bf16, nvfp4"]
)
def test_cuda_graphs_compute_the_same(small_preset: Preset, teacher: Path, options: dict[str, Any]) -> None:
    """Losses and gradients of stories of several lengths, also after the weights have changed and amax with them."""
    found = []
    for graph in (True, False):
        stage = stage_of(small_preset, teacher, chunks=(1, 2, 5), student_steps=3, graph=graph, **options)
        stage.prepare(torch.device("cuda"))
        host, turns = torch.Generator().manual_seed(3), []
        for turn in range(8):
            turns.append(gradients_of(stage, stage.scene(host)))
            for module in (*stage.modules.values(), *stage.critic_modules.values()):
                for p in module.parameters():
                    p.grad = None
                    p.data.mul_(1.01)
            if options.get("precision"):
                stage.networks.recalibrate(stage.calibration(turn))
        assert (stage.passes is not None) == graph
        if isinstance(stage.passes, GraphedChunkPass) and isinstance(stage.scorer, GraphedScorer):
            looks = [stage.passes.looks, *(look for look, _ in stage.scorer.captured.values())]
            learns = [*stage.passes.learns.values(), *(learn for _, learn in stage.scorer.captured.values())]
            assert all(captured.enabled for captured in (*looks, *learns, stage.passes.writes))
            assert len(stage.passes.looks.graphs) == 4 and len(stage.passes.learns) == 5
        found.append(turns)
    errors = [worst(*turns) for turns in zip(*found, strict=True)]
    assert max(errors) <= (1e-2 if "fp32" in options else 0.1), [
        (error, {name: (float(x.norm()), float(other[name].norm())) for name, x in one.items()})
        for error, one, other in zip(errors, *found)
    ]


@pytest.mark.parametrize("on_disk", [False, True])
def test_cuts_do_not_hang_on_an_offset(small_preset: Preset, teacher: Path, tmp_path: Path, on_disk: bool) -> None:
    """A preset whose shots get no offset of their own has cuts all the same."""
    told: list[list[list[bool]]] = []
    for offset in (small_preset.shot_rope_offset, 0):
        stage = stage_of(
            replace(small_preset, shot_rope_offset=offset), teacher, chunks=(3,), stories=6, seed=1,
            cache_dir=tmp_path / str(offset) if on_disk else None,
        )  # fmt: skip
        stage.prepare(CPU)
        told.append(stage.scenes.cuts)
    assert small_preset.shot_rope_offset and told[0] == told[1] and any(any(cuts) for cuts in told[0])
    assert not any(cuts[0] for cuts in told[0])


def test_a_teacher_comes_with_its_own_vae(small_preset: Preset, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(teacher, folder)
    about = json.loads((folder / "dit.json").read_text())
    mine = json.loads((folder / "vae.json").read_text())["sha256"]
    (folder / "dit.json").write_text(json.dumps({**about, "vae_sha256": mine}))
    given: dict[str, Any] = {"student_steps": 2, "batch": 2, "chunks": (2,), "stories": 2}
    stage = DistillStage(DistillOptions(small_preset, teacher=folder, **given))
    assert stage.companions[0] == folder / "vae.safetensors"
    stage.prepare(CPU)
    (folder / "dit.json").write_text(json.dumps({**about, "vae_sha256": "0" * 64}))
    with pytest.raises(
        LongtakeError, match="own was trained on latents of another VAE\n  got: .*\n  expected: .* sha256 0000"
    ):
        DistillStage(DistillOptions(small_preset, teacher=folder, **given)).prepare(CPU)
