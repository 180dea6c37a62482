"""Roll-outs of which only the end is learnt on: what is generated before it, what the scores see, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_distillation import RATE, stage_of
from untrained import random_models

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.training.distill.learnt import places_of, scored, scored_chunks
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.rollout import Rollout, Story
from longtake.training.distill.scene import Scene
from longtake.training.distill.trainer import DistillTrainer
from longtake.training.models.presets import Preset
from longtake.training.models.wan.slots import visible_blocks
from longtake.training.models.wan.window import shot_offsets, window_history
from longtake.training.objective.teacher_forcing import Clips, Noise, predict_velocity
from longtake.training.trainer import TrainConfig

CPU = torch.device("cpu")
CUTS = [
    [False, False, True, False, False, False, False, True, False],
    [False, True, False, False, True, False, False, False, False],
]
N = len(CUTS[0])


def scene_of(preset: Preset, learnt: int) -> Scene:
    """Two stories with cuts in different places."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(2, N, preset.text.length, preset.dit.text_dim, generator=generator)
    shape = (2, N * preset.chunk_latents, preset.dit.channels, *preset.latent_hw)
    offsets = torch.tensor([shot_offsets(cuts, preset.shot_rope_offset) for cuts in CUTS])
    history = torch.stack([window_history(cuts, preset.window_chunks) for cuts in CUTS])
    tokens = torch.arange(2 * N, dtype=torch.int32).view(2, N, 1).expand(-1, -1, preset.text.length)
    clips = Clips(torch.randn(shape, generator=generator), tokens, history, preset.window_chunks, offsets)
    return Scene(clips, Story(text, CUTS, torch.randn(shape, generator=generator)), 0, learnt)


def test_before_the_learnt_end_is_what_a_session_generates(small_preset: Preset) -> None:
    dit, scene = random_models(small_preset, seed=1).dit, scene_of(small_preset, 2)
    rollout, frames = Rollout(small_preset, 2, "nvfp4"), small_preset.chunk_latents
    text = scene.story.embeddings.clone().requires_grad_(True)
    video = rollout(dit, replace(scene.story, embeddings=text), 0, gradient=True, learnt=2)
    with torch.no_grad():
        whole = rollout(dit, scene.story, 1)  # the last step of two: a session's
    before = (N - 2) * frames
    assert torch.equal(video[:, :before], whole[:, :before])
    assert not torch.allclose(video[:, before:], whole[:, before:], atol=1e-3)
    assert video.requires_grad
    (grad,) = torch.autograd.grad(video.square().sum(), text)
    reached = grad.abs().amax((0, 2, 3)) > 0
    assert reached.tolist() == [False] * (N - 2) + [True] * 2


def test_the_scores_see_the_learnt_end_and_what_it_sees(small_preset: Preset) -> None:
    window = small_preset.window_chunks
    for learnt in (1, 2, 4, N - 1, N):
        places = places_of(CUTS, window, learnt)
        assert places.shape == (2, scored_chunks(N, window, learnt))
        for story, row in zip(CUTS, places.tolist()):
            needed = {block for later in visible_blocks(story, window)[N - learnt :] for block in later}
            assert needed == set(row) and row == sorted(row)


@torch.no_grad()
def test_in_one_layer_the_end_alone_is_predicted_as_in_the_whole_video(small_preset: Preset) -> None:
    """Where keys and values depend on no earlier chunk, nothing may be lost: positions, prompts, masks, noise."""
    preset = replace(small_preset, dit=replace(small_preset.dit, layers=1))
    dit, frames = random_models(preset, seed=1).dit, preset.chunk_latents
    for learnt in (2, 4):
        scene = scene_of(preset, learnt)
        generator = torch.Generator().manual_seed(6)
        levels = torch.rand(2, N, 1, generator=generator)
        noise = Noise(
            torch.randn(scene.clips.latents.shape, generator=generator), torch.cat((1000 * levels, levels, levels), -1)
        )
        whole = predict_velocity(dit, preset, scene.story.embeddings, scene.clips, noise)
        clips, text, part = scored(preset, scene, scene.clips.latents)
        places = places_of(CUTS, preset.window_chunks, learnt)
        rows = torch.arange(2)[:, None]
        own = Noise(noise.eps.unflatten(1, (N, -1))[rows, places].flatten(1, 2), noise.levels[rows, places])
        got = predict_velocity(dit, preset, text, clips, own)
        last = learnt * frames
        torch.testing.assert_close(got[:, -last:], whole[:, -last:], rtol=1e-4, atol=1e-4)
        assert clips.counted is not None and clips.counted[:, -last:].all() and not clips.counted[:, :-last].any()
        assert torch.equal(part[:, -last:], scene.clips.latents[:, -last:])


def test_all_learnt_is_as_without(small_preset: Preset) -> None:
    scene = scene_of(small_preset, N)
    video = torch.zeros_like(scene.clips.latents)
    clips, text, part = scored(small_preset, scene, video)
    assert part is video and text is scene.story.embeddings and clips.counted is None
    assert torch.equal(clips.history, scene.clips.history) and clips.unmasked == small_preset.window_chunks


MORE = {"i2v": True, "accumulate": 2, "precision": "nvfp4", "chunks": (1, 2), "rollout": (6, 7)}


@pytest.mark.parametrize("options", [{}, pytest.param(MORE, marks=pytest.mark.slow)], ids=["plain", "more"])
def test_a_long_rollout_is_learnt_on(small_preset: Preset, teacher: Path, tmp_path: Path, options: dict) -> None:
    stage = stage_of(small_preset, teacher, **{"chunks": (1,), "rollout": (5,), **options})
    config = TrainConfig(out=tmp_path, preset=small_preset.name, steps=2, optimizer=RATE, evaluate_steps=0, log_steps=1)
    metrics = DistillTrainer(stage, config, RATE, CPU).fit()
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    after, start = load_file(tmp_path / "dit.safetensors"), load_file(teacher / "dit.safetensors")
    assert any(not torch.equal(after[key], start[key]) for key in start)
    assert read_json(tmp_path / "dit.json")["distillation"]["rollout"] == list(stage.options.rollout or ())
    assert stage.train.tokens.shape[1] == stage.options.longest
    scene = stage.scene(torch.Generator().manual_seed(0))
    assert scene.clips.chunks in (stage.options.rollout or ()) and scene.learnt in stage.options.chunks


def test_what_has_no_room_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="the roll-out is shorter than what is learnt on") as error:
        DistillOptions(teacher=tmp_path, chunks=(4, 8), rollout=(6, 7, 8))
    assert "--rollout 6..8 with --chunks 4,8" in str(error.value) and "--rollout 8..8" in str(error.value)
    with pytest.raises(LongtakeError, match="don't see the end of a roll-out alone"):
        DistillOptions(teacher=tmp_path, chunks=(4,), rollout=(8,), score_context="noisy")
    with pytest.raises(LongtakeError, match="too short for a subject to return"):
        DistillOptions(teacher=tmp_path, data="returning-digits", chunks=(4,), rollout=(8,), return_distance=(7, 9))
    DistillOptions(teacher=tmp_path, data="returning-digits", chunks=(4,), rollout=(9,), return_distance=(7, 9))
