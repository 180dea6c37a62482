"""Distillation of a small world: roll-outs against a session, where gradients go, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_rooms import train
from untrained import random_models
from walked import poses_of_action

from longtake.accuracy.compare import recipe_models
from longtake.errors import LongtakeError
from longtake.formats.recipe import Gate, Recipe
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.generator import Generator
from longtake.runtime.view import View
from longtake.training.data.rooms.latents import Walks
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.walks import WalkScene, roll_out, score_levels, student_schedule, walk_gradient
from longtake.training.distill.world_stage import WorldDistillStage
from longtake.training.models.checkpoint import read_side_file
from longtake.training.models.families import family_of
from longtake.training.models.load import Models, load_models
from longtake.training.models.presets import TINY, Preset
from longtake.training.models.sampler import noise_for_chunk
from longtake.training.objective.walk_forcing import Walk

CHUNKS = 4


@pytest.fixture(scope="module")
def models(preset: Preset) -> Models:
    return random_models(preset, 3)


def recipe_of(preset: Preset) -> Recipe:
    gate = Gate(dit=0.03, vae=0.03, text_encoder=0.03, context=0.03, ssim=0.98)
    return Recipe("small_bf16", "small", "bf16", "bf16", "9.0", "segmented", gate, own_preset=preset)


def scene_of(preset: Preset, first: torch.Tensor, text: torch.Tensor, exit_step: int) -> WalkScene:
    noise = torch.cat([noise_for_chunk(preset, 4, chunk) for chunk in range(CHUNKS)], 1).transpose(1, 2)
    latents = torch.zeros_like(noise)
    latents[:, :, 0] = first
    poses = torch.from_numpy(poses_of_action("w-40, wd-56").astype(np.float64))[None]
    grid = torch.tensor([preset.latent_hw[1] / preset.width, preset.latent_hw[0] / preset.height] * 2)
    intrinsics = (torch.tensor([[40.0, 40, 24, 16]]) * grid).double()
    walks = Walks(latents, torch.ones(1, 32, dtype=torch.int32), poses, intrinsics)
    return WalkScene(walks, text, text, noise, exit_step)


def test_a_roll_out_is_what_a_session_generates(preset: Preset, models: Models) -> None:
    oracle = recipe_models(models, "bf16")
    view = View(camera=poses_of_action("w-40, wd-56").astype(np.float64), intrinsics=np.array([40.0, 40, 24, 16]))
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    generator = Generator(TorchBackend(recipe_of(preset), models), models.text.tokenizer)
    session = generator.session(["a room"] * CHUNKS, seed=4, image=picture, view=view, decode=False)
    assert session._first is not None
    with torch.no_grad():
        text = oracle.text(models.text.tokenize(["a room"]))
    got = roll_out(oracle.dit, preset, scene_of(preset, session._first, text, 1), student_schedule(preset, 2), 1)
    wanted = torch.cat([chunk.latents for chunk in session], 1).transpose(1, 2)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    assert student_schedule(preset, 2).timesteps == (1000, 727) and len(student_schedule(preset, 3).timesteps) == 3


def test_a_chunks_gradient_comes_from_its_own_exit_pass_alone(preset: Preset, models: Models) -> None:
    """What the first chunk left carries none: the gradient is that of one pass over the second, all else given."""
    scene, dit = scene_of(preset, torch.randn(1, 8, 2, 3), torch.randn(1, 32, 16), 0), models.dit
    made = roll_out(dit, preset, scene, student_schedule(preset, 2), 0, gradient=True)
    made[:, :, 4:7].square().sum().backward()
    got = {name: p.grad.clone() for name, p in dit.named_parameters()}
    dit.zero_grad()
    walk, noise = Walk(dit, preset, scene.walks, scene.text, preset.window_chunks - 1), scene.noise[:, :, 4:7]
    with torch.no_grad():
        walk.clean(range(4), made[:, :, :4].detach())
    velocity, _ = walk.look(range(4, 7), noise, torch.full((1, 3), 1000.0))
    (noise - velocity).square().sum().backward()
    for name, parameter in dit.named_parameters():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-4, atol=1e-5), name
    assert all(bool(got[name].any()) for name in got if ".qkv." in name)
    dit.zero_grad()


def test_scores_see_one_level_or_one_a_chunk(preset: Preset) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = score_levels(preset, 10, 3, generator, whole=True).frames
    assert bool((whole[:, 1:] == whole[:, 1:2]).all()) and not bool(whole[:, 0].any())
    apart = score_levels(preset, 10, 64, generator, whole=False).frames
    assert bool((apart[:, 4] != apart[:, 7]).any()) and bool((apart[:, 4] == apart[:, 6]).all())
    assert float(whole[:, 1:, 0].min()) >= 20 and float(apart[..., 0].max()) <= 980


@pytest.mark.slow
def test_the_command_makes_a_student_that_generates(
    preset_file: Path, preset: Preset, teacher: Path, tmp_path: Path
) -> None:
    words = "--stage dit --context window --loss-weighting uniform --steps 1 --batch 1 --stories 2 --chunks 2".split()
    assert train(preset_file, tmp_path / "causal", *words, "--init", str(teacher)) == 0
    words = "--student-steps 2 --critic-updates 2 --steps 2 --batch 1 --stories 2 --chunks 2".split()
    names = ["--teacher", str(teacher), "--student", str(tmp_path / "causal")]
    assert train(preset_file, tmp_path / "student", *words, *names, command="distill") == 0
    told = json.loads((tmp_path / "student" / "dit.json").read_text())
    assert told["distillation"]["score_context"] == "whole" and told["context"] == "window"
    began = {"folder": "causal", "sha256": json.loads((tmp_path / "causal" / "dit.json").read_text())["sha256"]}
    assert told["parts"][-1]["from"] == began and told["distillation"]["student_sha256"] == began["sha256"]
    assert told["sampling"] == {"steps": 2, "guidance": 1.0, "shift": 1.0, "timesteps": [1000, 727]}
    models = load_models(preset, tmp_path / "student")
    assert set(models.amax) == set(family_of(preset).linears(models.dit))
    sampling = read_side_file(tmp_path / "student" / "dit.safetensors", kind="dit", preset=preset).sampled
    generator = Generator(TorchBackend(recipe_of(preset), models), models.text.tokenizer, sampling=sampling)
    session = generator.session(["a room with red walls"] * 2, image=np.zeros((32, 48, 3), np.uint8))
    assert session.options.schedule.timesteps == (1000, 727) and session.options.guidance == 1
    assert [len(chunk.frames) for chunk in session] == [25, 24]


@pytest.mark.parametrize(
    "given, says",
    [
        ({"data": "digits"}, r"videos with cameras"),
        ({"lora_rank": 4, "data": "rooms"}, r"(?s)not for worlds.*lora-rank"),
        ({"score_context": "noisy", "data": "rooms"}, r"(?s)not for worlds.*--score-context"),
        ({"cache": "bf16", "data": "rooms"}, r"(?s)not for worlds.*--cache"),
        ({"i2v": True, "data": "rooms"}, r"(?s)not for worlds.*--i2v"),
    ],
)
def test_what_no_world_is_distilled_with(preset: Preset, given: dict[str, object], says: str) -> None:
    with pytest.raises(LongtakeError, match=says):
        WorldDistillStage(DistillOptions(**{"preset": preset, "teacher": Path("t"), **given}))  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_dry_run_refuses_what_a_run_does(
    preset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    words = ["--stage", "dit"] if command == "train" else ["--teacher", str(tmp_path / "none")]
    words += ["--chunks", "2", "--batch", "1", "--dry-run"]
    assert train(preset_file, tmp_path / "run", *words, "--sample-steps", "5", command=command) != 0
    assert "--sample-steps" in capsys.readouterr().err
    assert train(preset_file, tmp_path / "run", *words, command=command) == 0


def test_a_chunks_error_leaves_the_gradient_of_others_alone(preset: Preset) -> None:
    """Where scores see chunks at levels of their own; of a walk that they see whole, one mean goes over all of it."""
    x, real, fake = torch.randn(3, 2, 10, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(2, 10, dtype=torch.bool)
    counted[:, 0] = False
    far = real.clone()
    far[:, 4:7] = x[:, 4:7] + 3 * (real - x)[:, 4:7]
    for whole in (False, True):
        one, other = (walk_gradient(preset, x, seen, fake, counted, whole) for seen in (real, far))
        rest = [0, 1, 2, 3, 7, 8, 9]
        assert torch.equal(one[:, rest], other[:, rest]) is not whole
        assert not torch.equal(one[:, 4:7], other[:, 4:7]) and not bool(one[:, 0].any())


def test_only_a_world_has_a_student_of_its_own() -> None:
    with pytest.raises(LongtakeError, match=r"(?s)begins as the teacher.*leave --student out"):
        DistillOptions(preset=TINY, teacher=Path("t"), student=Path("s"))
