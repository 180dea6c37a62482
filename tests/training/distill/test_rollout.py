"""The student's rollout is what a session generates, and its gradient goes where it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from untrained import random_models

from longtake.formats.recipe import recipe_named
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.generator import Generator
from longtake.runtime.story import Segment
from longtake.runtime.video_model import VideoModel
from longtake.training.distill.rollout import Rollout, Story
from longtake.training.models.presets import TINY, Preset
from longtake.training.models.sampler import flow_sigmas, noise_for_chunk
from longtake.training.models.text.words import tokenize
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.family import Wan

PROMPTS = ["a green seven", "a red circle", "a blue three", "two white squares", "a red seven", "a green circle"]
CUTS = [False, False, True, False, False, True]


def story_of(preset: Preset, cuts: list[bool], seed: int = 0) -> Story:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, len(cuts), preset.text.length, preset.dit.text_dim, generator=generator)
    frames = (1, len(cuts) * preset.chunk_latents, preset.dit.channels, *preset.latent_hw)
    return Story(text, [cuts], torch.randn(frames, generator=generator))


@pytest.fixture(scope="module")
def small_dit(small_preset: Preset) -> CausalDiT:
    return random_models(small_preset, seed=1).dit


@torch.no_grad()
def test_a_rollout_is_what_a_session_generates() -> None:
    backend = TorchBackend(recipe_named("tiny_bf16_sm90"), models=random_models(TINY))
    script = tuple(Segment(prompt, 1, cut) for prompt, cut in zip(PROMPTS, CUTS))
    session = Generator(backend, tokenize).session(script, seed=3, steps=2, guidance=1.0, decode=False)
    wanted = torch.cat([chunk.latents for chunk in session], 1)
    tokens = tokenize([Wan().prompt(segment.prompt, segment.cut) for segment in script], TINY.text.length)
    text = torch.cat([VideoModel(backend).text(row[None]) for row in tokens])[None]
    noise = torch.cat([noise_for_chunk(TINY, 3, chunk) for chunk in range(len(script))], 1)
    dit = backend._modules["dit"].dit
    got = Rollout(TINY, 2, "bf16")(dit, Story(text, [CUTS], noise), exit_step=1)
    for block, (ours, theirs) in enumerate(zip(got.split(8, 1), wanted.split(8, 1))):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), block


@torch.no_grad()
def test_stories_of_a_batch_keep_their_own_cuts(small_dit: CausalDiT, small_preset: Preset) -> None:
    rollout = Rollout(small_preset, 2, "nvfp4")
    one, two = story_of(small_preset, CUTS, 1), story_of(small_preset, [False] * 6, 2)
    both = Story(torch.cat((one.embeddings, two.embeddings)), [*one.cuts, *two.cuts], torch.cat((one.noise, two.noise)))
    got = rollout(small_dit, both, 1)
    for row, story in zip(got.split(1), (one, two)):
        torch.testing.assert_close(row, rollout(small_dit, story, 1), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_two_steps_are_one_euler_step_and_x0(small_dit: CausalDiT, small_preset: Preset) -> None:
    story = story_of(small_preset, [False])
    rollout = Rollout(small_preset, 2, "bf16")
    first_x0 = rollout(small_dit, story, 0)
    high, low, _ = flow_sigmas(2, 5.0)
    velocity = (story.noise - first_x0) / high
    euler = story.noise + (low - high) * velocity
    last = Rollout(small_preset, 1, "bf16")
    sigma_one = flow_sigmas(1, 5.0)[0]
    told = last(small_dit, Story(story.embeddings, story.cuts, euler), 0)  # x - sigma_1 v at timestep 999 ...
    got = rollout(small_dit, story, 1)
    assert not torch.allclose(told, got), "the second step must be told its own timestep"
    assert sigma_one == high

    class AtStep(Rollout):
        """Starts at the second step, from what the Euler step gave."""

        def _denoise(self, sample: Tensor, first: Tensor | None, velocity, exit_step: int, gradient: bool) -> Tensor:  # type: ignore[no-untyped-def]
            return sample - low * velocity(sample, 833)

    direct = AtStep(small_preset, 2, "bf16")(small_dit, Story(story.embeddings, story.cuts, euler), 1)
    torch.testing.assert_close(got, direct, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cut_moves_the_rotary_positions(small_dit: CausalDiT, small_preset: Preset) -> None:
    cut, uncut = story_of(small_preset, [False, True, False]), story_of(small_preset, [False, False, False])
    rollout = Rollout(small_preset, 2, "bf16")
    assert rollout.positions(cut.cuts, 2, torch.device("cpu"))[0, 0] == 16 + small_preset.shot_rope_offset
    with_phi, without = rollout(small_dit, cut, 1), rollout(small_dit, uncut, 1)
    assert torch.equal(with_phi[:, :8], without[:, :8])
    assert not torch.allclose(with_phi[:, 8:16], without[:, 8:16], atol=1e-5)


def test_the_loss_of_a_chunk_reaches_its_own_exit_pass_only(small_dit: CausalDiT, small_preset: Preset) -> None:
    story = story_of(small_preset, [False, True])
    text = story.embeddings.clone().requires_grad_(True)
    video = Rollout(small_preset, 2, "bf16")(small_dit, Story(text, story.cuts, story.noise), 1, gradient=True)
    (grad,) = torch.autograd.grad(video[:, 8:].square().sum(), text)
    assert grad[:, 1].abs().max() > 0
    assert grad[:, 0].abs().max() == 0, "a chunk's loss went through the cache into the chunk before it"


def test_the_first_frame_stays_given(small_dit: CausalDiT, small_preset: Preset) -> None:
    story = story_of(small_preset, [False, False])
    first = torch.randn(1, small_preset.dit.channels, *small_preset.latent_hw, requires_grad=True)
    given = Story(story.embeddings, story.cuts, story.noise, first.detach())
    video = Rollout(small_preset, 2, "bf16")(small_dit, given, 1, gradient=True)
    assert torch.equal(video[:, 0], first)
    assert not torch.equal(video[:, 1:], Rollout(small_preset, 2, "bf16")(small_dit, story, 1)[:, 1:])


def test_recomputed_blocks_see_the_cache_as_it_was(small_preset: Preset) -> None:
    """In the backward pass, when the window has long moved on: gradients with checkpointing are those without."""
    story = story_of(small_preset, CUTS)
    found = []
    for checkpointing in (False, True):
        dit = random_models(small_preset, seed=1).dit
        dit.checkpointing = checkpointing
        Rollout(small_preset, 2, "nvfp4")(dit, story, 1, gradient=True).square().mean().backward()
        found.append([p.grad for p in dit.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*found))
