"""A real session through the torch backend against one teacher-forced pass over what it generated.

Session, slot table, positions, prompts, clean pass and cache ops on one side; masks over the whole clip on the other.
Every velocity that the session's sampler was given must be the one that teacher forcing predicts, for the same noisy
chunk and the session's own clean history.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from untrained import random_models

from longtake.errors import LongtakeError
from longtake.formats.recipe import recipe_named
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.chunk import Chunk
from longtake.runtime.generator import Generator
from longtake.runtime.story import Segment
from longtake.runtime.video_model import VideoModel
from longtake.training.models.presets import TINY
from longtake.training.models.sampler import schedule_of, unipc_steps
from longtake.training.models.text.words import tokenize
from longtake.training.models.wan.family import Wan
from longtake.training.models.wan.window import full_history, shot_offsets, window_history
from longtake.training.objective.teacher_forcing import Clips, Noise, predict_velocity

STEPS = 2
PROMPTS = ["a green seven", "a red circle", "a blue three", "two white squares", "a red seven", "a green circle"]


class Recording(TorchBackend):
    """Keeps each denoise pass's noisy chunk and velocity, [C, F, H, W]."""

    passes: list[tuple[Tensor, Tensor]]

    def run(self, network: str, inputs: Any, state: Any = None, commit: bool = True) -> Any:
        outputs = super().run(network, inputs, state, commit)
        if network == "dit" and not commit:
            self.passes.append((inputs["latents"][0].clone(), outputs["velocity"][0].clone()))
        return outputs


@pytest.fixture(scope="module")
def backend() -> Recording:
    return Recording(recipe_named("tiny_bf16_sm90"), models=random_models(TINY))


@pytest.mark.parametrize(
    "cuts", [[0, 0, 0, 0], [0, 0, 1, 0, 0, 1]], ids=["window covers everything", "shots and sinks"]
)
@torch.no_grad()
def test_a_session_is_teacher_forcing_on_its_own_history(backend: Recording, cuts: list[int]) -> None:
    script = tuple(Segment(prompt, 1, bool(cut)) for prompt, cut in zip(PROMPTS, cuts))
    check(backend, script)


@pytest.mark.parametrize("window", [3, 5])
@torch.no_grad()
def test_a_window_of_another_size_holds_everywhere(window: int) -> None:
    """Cache, session and training agree on it, past the point where the cache is full."""
    preset = replace(TINY, dit=replace(TINY.dit, layers=2), height=64, width=64, window_chunks=window)
    backend = Recording(recipe_named("tiny_bf16_sm90"), models=random_models(preset))
    chunks = check(backend, tuple(Segment(prompt, 1, i in (1, 3)) for i, prompt in enumerate(PROMPTS)))
    assert [len(chunk.visible) for chunk in chunks] == [min(i + 1, window) for i in range(len(chunks))]
    assert next(iter(backend.new_state("dit").tensors.values())).shape[0] == window


@pytest.mark.parametrize("window", [-1, 0, 2])
def test_a_window_without_room_for_sinks_is_refused(window: int) -> None:
    with pytest.raises(
        LongtakeError, match=rf"(?s)preset tiny: the window is too small.*got: {window} chunks.*3 or more"
    ):
        replace(TINY, window_chunks=window)


def check(backend: Recording, script: tuple[Segment, ...]) -> list[Chunk]:
    """Generate `script` and compare each pass with teacher forcing; the chunks."""
    cuts, preset = [segment.cut for segment in script], backend.preset
    chunks = generate(backend, script)
    clips, embeddings = as_clips(backend, script, chunks)
    dit = backend._modules["dit"].dit
    for step, level in enumerate(unipc_steps(schedule_of(STEPS))):
        noisy = torch.cat([backend.passes[i * STEPS + step][0] for i in range(len(cuts))], 1).transpose(0, 1)[None]
        got = torch.cat([backend.passes[i * STEPS + step][1] for i in range(len(cuts))], 1).transpose(0, 1)
        eps = (noisy - (1 - level.sigma) * clips.latents) / level.sigma
        levels = torch.tensor([level.timestep, level.sigma, 1.0]).expand(1, len(cuts), 3)
        wanted = predict_velocity(dit, preset, embeddings, clips, Noise(eps, levels))[0]
        for block, (ours, theirs) in enumerate(zip(got.split(8), wanted.split(8))):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), (step, block)
    return chunks


def generate(backend: Recording, script: tuple[Segment, ...]) -> list[Chunk]:
    """The chunks of a session, its passes recorded."""
    backend.passes = []
    session = Generator(backend, tokenize).session(script, seed=3, steps=STEPS, guidance=1.0, decode=False)
    return list(session)


def as_clips(backend: Recording, script: tuple[Segment, ...], chunks: list[Chunk]) -> tuple[Clips, Tensor]:
    """What the session generated as a clip to be teacher-forced, and its prompts' embeddings."""
    cuts, count = [segment.cut for segment in script], len(script)
    tokens = tokenize([Wan().prompt(segment.prompt, segment.cut) for segment in script], TINY.text.length)
    embeddings = torch.cat([VideoModel(backend).text(row[None]) for row in tokens])[None]
    history = window_history(cuts, backend.preset.window_chunks) if any(cuts) else full_history(count)
    offsets = torch.tensor([shot_offsets(cuts, TINY.shot_rope_offset)])
    return Clips(torch.cat([c.latents for c in chunks], 1), tokens[None], history[None], 0, offsets), embeddings
