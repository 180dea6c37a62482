"""Image to video and padded clips on many ranks: the parts are those of the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longtake.training.models.presets import Preset
from longtake.training.models.wan.window import full_history
from longtake.training.objective.teacher_forcing import Clips, draw_noise, noisy_part
from longtake.training.parallel.forcing import part_of
from longtake.training.parallel.layout import Layout


@pytest.mark.parametrize("mode", ["balanced", "naive"])
def test_the_parts_put_together_are_the_whole(small_preset: Preset, mode: str) -> None:
    chunks, frames = 4, small_preset.chunk_latents
    latents = torch.randn(2, chunks * frames, 3, 2, 2)
    given = torch.zeros(2, chunks * frames, dtype=torch.bool)
    given[0, 0] = True
    clips = Clips(latents, torch.zeros(2, chunks, 1, dtype=torch.int32), full_history(chunks), chunks, given=given)
    noise = draw_noise(clips, 5.0, torch.Generator().manual_seed(0))
    noise = replace(noise, start=latents + 1, context=latents - 1)
    noisy, timesteps = noisy_part(clips, noise)
    layout, seen = Layout(mode, chunks, 2), []
    for rank in range(2):
        part = part_of(clips, noise, layout, rank, frames)
        for i, place in enumerate(layout.local(rank)):
            own, chunk = slice(i * frames, (i + 1) * frames), place % chunks
            there = slice(chunk * frames, (chunk + 1) * frames)
            if place < chunks:
                assert torch.equal(part.latents[:, own], latents[:, there] - 1) and not part.timesteps[:, own].any()
            else:
                assert torch.equal(part.latents[:, own], noisy[:, there])
                assert torch.equal(part.timesteps[:, own], timesteps[:, there])
            seen.append(place)
    assert sorted(seen) == list(range(2 * chunks))
