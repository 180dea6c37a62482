"""Training of a small world: what a batch reads, teacher forcing against a session's own passes, and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_rooms import train
from untrained import random_models

from longtake.errors import LongtakeError
from longtake.training.data.rooms.latents import Walks, walks_from_rooms
from longtake.training.data.rooms.rooms import Rooms
from longtake.training.dry_run import describe
from longtake.training.models.families import family_of
from longtake.training.models.load import load_models
from longtake.training.models.presets import Preset
from longtake.training.models.sana_wm import memory
from longtake.training.models.sana_wm.kit import PLAIN, Kit
from longtake.training.models.sana_wm.memory import Memory
from longtake.training.objective.walk_forcing import Levels, Walk, bell, draw_levels, flow_loss, predict, spans_of
from longtake.training.stages.options import StageOptions
from longtake.training.stages.world import WorldStage


def some_walks(preset: Preset, chunks: int, batch: int = 2) -> Walks:
    generator = torch.Generator().manual_seed(5)
    frames = preset.first_frame(chunks)
    shown = 1 + preset.vae.stride[0] * (frames - 1)
    poses = torch.eye(4, dtype=torch.float64).repeat(batch, shown, 1, 1)
    angle = torch.linspace(0, 0.4, shown, dtype=torch.float64) * torch.tensor([[1.0], [-2.0]])[:batch]
    poses[..., 0, 0] = poses[..., 2, 2] = angle.cos()
    poses[..., 0, 2], poses[..., 2, 0], poses[..., 2, 3] = angle.sin(), -angle.sin(), angle.abs()
    latents = torch.randn(batch, preset.dit.channels, frames, *preset.latent_hw, generator=generator)
    intrinsics = torch.tensor([[2.0, 2.1, 1.5, 1.0], [2.4, 2.4, 1.4, 0.9]], dtype=torch.float64)[:batch]
    return Walks(latents, torch.zeros(batch, 32, dtype=torch.int32), poses, intrinsics)


def test_spans_and_levels(preset: Preset) -> None:
    assert spans_of(preset, 3) == [range(0, 4), range(4, 7), range(7, 10)]
    assert spans_of(preset, 3, whole=True) == [range(10)]
    generator = torch.Generator().manual_seed(0)
    levels = draw_levels(spans_of(preset, 3), 4000, 0.9, generator)
    assert bool((levels.times == levels.times.floor()).all()) and float(levels.times.max()) < 1000
    for span in (range(1, 4), range(4, 7), range(7, 10)):
        assert bool((levels.times[:, span.start : span.stop] == levels.times[:, [span.start]]).all())
    assert float((levels.times[:, 0] == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
    assert float(levels.sigmas.flatten().median()) > 0.85  # shifted towards noise
    assert float(bell(levels.frames[:, 4:, 1].clamp(max=1)).min()) >= 0 and float(bell(torch.tensor(1.0))) == 0


def test_a_given_frame_is_clean_and_does_not_count(preset: Preset) -> None:
    walks = some_walks(preset, 1)
    rows = torch.tensor([500.0, 0.5, 1.0]).repeat(2, 4, 1)
    rows[0, 0] = 0
    eps, levels = torch.ones_like(walks.latents), Levels(rows)
    right = eps - walks.latents
    wrong = right.clone()
    wrong[0, :, 0] += 9
    assert float(flow_loss(wrong, walks, eps, levels)[0]) < 1e-10
    wrong[1, :, 0] += 9
    assert float(flow_loss(wrong, walks, eps, levels)[0]) == pytest.approx(81 / 7, rel=1e-4)


@torch.no_grad()
def test_teacher_forcing_is_what_a_session_computes(preset: Preset) -> None:
    """The last chunk's velocity, after clean passes over the others, one walk at a time with the family's own inputs."""
    dit, family, walks = random_models(preset, 1).dit, family_of(preset), some_walks(preset, 4)
    embeddings = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(2))
    embeddings[:, 20:] = 0
    eps = torch.randn(walks.latents.shape, generator=torch.Generator().manual_seed(3))
    rows = torch.tensor([600.0, 0.6, 1.0]).repeat(2, 13, 1)
    got = predict(dit, preset, walks, embeddings, eps, Levels(rows), "window")
    from longtake.training.models.sana_wm.attention import Camera
    from longtake.training.models.sana_wm.dit import Chunk

    for row in range(2):
        memory = Memory(preset.dit, preset.frame_tokens, preset.window_chunks - 1)  # type: ignore[arg-type]
        bias = torch.where(embeddings[row].abs().amax(-1) > 0, 0.0, -1e4)
        for number, span in enumerate(spans_of(preset, 4)):
            first = 8 * (span.start - 1) + 1 if number else 0
            shown = walks.poses[row, first : 8 * (span.stop - 1) + 1]
            rope = family.chunk_inputs(preset, number, 0)
            seen = family.camera_inputs(  # type: ignore[attr-defined]
                preset, number, shown, walks.intrinsics[row].expand(len(shown), 4)
            )
            half = rope["camera_rope_cos"], rope["camera_rope_sin"]
            chunk = Chunk((rope["rope_cos"], rope["rope_sin"]), Camera(seen["rays"], seen["inverse_rays"], half),
                          dit.plucker(seen["plucker"][0]), memory.attend, memory.carried)  # fmt: skip
            clean = walks.latents[row, :, span.start : span.stop]
            noisy = 0.4 * clean + 0.6 * eps[row, :, span.start : span.stop]
            for latents, time in ((noisy, 600), (clean, 0)):
                sinusoid = family.pass_inputs(preset, len(span), time, 0)["timestep_sinusoid"]
                velocity, kept = dit(latents, sinusoid, dit.context(embeddings[row]), bias, chunk)
                if time:
                    assert float((velocity - got[row, :, span.start : span.stop]).abs().max()) < 1e-4
            memory.commit(kept)


def test_a_whole_walk_is_seen_forwards_and_backwards(preset: Preset) -> None:
    """In the last frame's noise: it shows in the first frame of a whole walk, and not in that of a chunk-causal one."""
    dit, walks = random_models(preset, 1).dit, some_walks(preset, 2)
    embeddings, levels = torch.ones(2, 32, 16), Levels(torch.tensor([600.0, 0.6, 1.0]).repeat(2, 7, 1))
    eps = torch.zeros_like(walks.latents)
    other = eps.clone()
    other[:, :, -1] = 1
    with torch.no_grad():
        for context, same in (("whole", False), ("full", True)):
            first, second = (predict(dit, preset, walks, embeddings, e, levels, context)[:, :, 0] for e in (eps, other))
            assert torch.equal(first, second) is same


@torch.no_grad()
def test_what_is_stated_to_be_fp32_is_so_under_autocast(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op's results under bf16 autocast are bit by bit those of the same inputs without; so are states that are carried."""
    walks, text = some_walks(preset, 2), torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(4))
    dit = random_models(preset, 1).dit
    compared: list[str] = []

    def beside(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            got = op(*inputs)
            with torch.autocast("cpu", enabled=False):
                wanted = op(*inputs)
            for one, other in zip(*([x] if torch.is_tensor(x) else x for x in (got, wanted)), strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other), name
            compared.append(name)
            return got

        return run

    kit = Kit(**{name: beside(name, op) for name, op in PLAIN._asdict().items()})
    monkeypatch.setattr(memory, "plain_attention", beside("attention", memory.plain_attention))
    walk = Walk(dit, preset, walks, text)
    with torch.autocast("cpu", torch.bfloat16):
        walk.clean(range(4), walks.latents[:, :, :4])
        chunk = replace(walk.chunk(range(4, 7)), kit=kit)
        _, kept = walk.look(range(4, 7), walks.latents[:, :, 4:], torch.zeros(2, 3), chunk)
    assert {"gdn_scan", "gdn_scan_camera", "ray_prepare_gdn", "ray_prepare_softmax", "ray_restore", "gated_ffn"} <= {
        *compared
    }
    assert "attention" in compared
    attn: Any = dit.blocks[0].attn
    u = torch.randn(2, 3, 6, 32, generator=torch.Generator().manual_seed(6))
    with torch.autocast("cpu", torch.bfloat16):
        gate = attn._gates(u)[1]
    assert torch.equal(gate, attn._gates(u)[1])
    plain = Walk(dit, preset, walks, text)
    plain.clean(range(4), walks.latents[:, :, :4])
    exact = plain.look(range(4, 7), walks.latents[:, :, 4:], torch.zeros(2, 3))[1]
    for one, other in ((one, other) for one, other in zip(kept, exact) if other.state is not None):
        assert one.state.dtype == one.norm.dtype == torch.float32
        assert float((one.state - other.state).norm() / other.state.norm()) < 0.02  # linears round to bf16


def test_every_parameter_learns(preset: Preset) -> None:
    dit, walks = random_models(preset, 1).dit, some_walks(preset, 2)
    eps = torch.randn(walks.latents.shape, generator=torch.Generator().manual_seed(3))
    levels = Levels(torch.tensor([600.0, 0.6, 1.0]).repeat(2, 7, 1))
    text = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(4))
    flow_loss(predict(dit, preset, walks, text, eps, levels, "full"), walks, eps, levels)[0].backward()
    still = [name for name, p in dit.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not still


@pytest.mark.slow
def test_the_commands_train_a_teacher_and_a_causal_one(
    preset_file: Path, preset: Preset, teacher: Path, tmp_path: Path
) -> None:
    told = json.loads((teacher / "dit.json").read_text())
    assert told["context"] == "whole" and told["i2v"] == 0.9
    assert told["sampling"] == {"steps": 2, "guidance": 1.0, "shift": 1.0}
    words = "--stage dit --context window --precision nvfp4 --steps 1 --batch 1 --stories 2 --chunks 3".split()
    assert train(preset_file, tmp_path / "causal", *words, "--init", str(teacher)) == 0
    models = load_models(preset, tmp_path / "causal")
    assert set(models.amax) == set(family_of(preset).linears(models.dit))
    assert {"room", "walls"} <= set(models.vocabulary)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"data": "digits"}, r"(?s)videos with cameras.*got: --data digits.*--data rooms"),
        ({"error_recycling": True}, r"(?s)not for worlds.*--error-recycling"),
        ({"gradient_checkpointing": True}, r"(?s)not for worlds.*--gradient-checkpointing"),
        ({"attention": "flex"}, r"(?s)not for worlds.*--attention"),
    ],
)
def test_what_no_world_is_trained_with(preset: Preset, given: dict[str, object], says: str) -> None:
    with pytest.raises(LongtakeError, match=says):
        WorldStage(StageOptions(**{"preset": preset, "data": "rooms", **given}))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_a_dry_run_tells_what_a_step_takes(preset: Preset, stage: str) -> None:
    lines = describe(stage, StageOptions(preset=preset, data="rooms", batch=2, chunks=(2,), context="window"))
    assert lines[-1] == "nothing was trained" and any("TFLOP" in line for line in lines)
    wanted = "video: [2, 3, 25, 32, 48]" if stage == "vae" else "latents: [2, 8, 7, 2, 3]"
    assert any(line.strip() == wanted for line in lines), lines


def test_only_worlds_see_a_whole_video() -> None:
    with pytest.raises(LongtakeError, match=r"(?s)only worlds.*--context full"):
        StageOptions(context="whole")


def test_walks_are_the_same_for_any_number_of_processes(preset: Preset) -> None:
    models = random_models(preset)
    text = models.text
    alone, shared = (
        walks_from_rooms(Rooms(preset, "eval"), models.vae, text, 2, 1, 7, "walks", workers) for workers in (0, 2)
    )
    assert not torch.equal(alone.latents[0], alone.latents[1])
    for name in ("latents", "tokens", "poses", "intrinsics"):
        assert torch.equal(getattr(alone, name), getattr(shared, name))
