from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.models.wan.window import full_history
from longtake.training.objective.error_recycling import ErrorBuffer, ErrorRecycling, RecyclingConfig
from longtake.training.objective.noise import add_noise, noise_table
from longtake.training.objective.teacher_forcing import Clips, Noise

SHIFT, CHUNKS, FRAMES, SHAPE = 5.0, 2, 4, (3, 2, 2)
ALWAYS = RecyclingConfig(clean=0.0, context=1.0, latent=1.0, noise=1.0, modulate=0.0, update_clean=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(batch: int = 2) -> Clips:
    latents = torch.randn(batch, CHUNKS * FRAMES, *SHAPE, generator=generator(1))
    return Clips(latents, torch.zeros(batch, CHUNKS, 1, dtype=torch.int32), full_history(CHUNKS), CHUNKS)


def noise_at(like: Clips, indices: list[list[int]]) -> Noise:
    return Noise(torch.randn(like.latents.shape, generator=generator(2)), noise_table(SHIFT)[torch.tensor(indices)])


def chunk(value: float) -> Tensor:
    return torch.full((FRAMES, *SHAPE), value)


def test_buckets_are_twentieths_of_the_grid() -> None:
    recycling = ErrorRecycling(RecyclingConfig(), SHIFT)
    middles = [20 * bucket + 10 for bucket in range(50)]
    levels = noise_table(SHIFT)[torch.tensor([middles])]
    got = recycling.buckets(levels)[0]
    # timesteps are rounded to bf16, which moves those near 1000, where a step of the grid is 0.2, by up to ten places
    assert all(abs(a - b) <= 1 for a, b in zip(got, range(50))) and got[15:] == list(range(15, 50))


def test_errors_are_what_they_are_called() -> None:
    recycling, own = ErrorRecycling(ALWAYS, SHIFT), clips()
    noise = noise_at(own, [[100, 600], [400, 999]])
    velocity = torch.randn(own.latents.shape, generator=generator(3))
    latent, error = recycling.errors(own, noise, velocity)
    sigma = noise.levels[..., 1].repeat_interleave(FRAMES, 1)[..., None, None, None]
    noisy = add_noise(own.latents, noise.eps, sigma)
    assert torch.allclose(latent.float(), noisy - sigma * velocity - own.latents, rtol=1e-2, atol=1e-2)
    predicted_eps = noisy + (1 - sigma) * velocity  # x_t = (1 - sigma) x0 + sigma eps, v = eps - x0
    assert torch.allclose(error.float(), predicted_eps - noise.eps, rtol=1e-2, atol=1e-2)
    perfect = recycling.errors(own, noise, noise.eps - own.latents)
    assert all(x.abs().max() < 1e-5 for x in perfect)


def test_each_error_goes_where_it_belongs() -> None:
    recycling, own = ErrorRecycling(ALWAYS, SHIFT), clips(1)
    noise = noise_at(own, [[705, 305]])  # buckets 35 and 15
    latent, eps = recycling.buffers["latent"], recycling.buffers["noise"]
    latent.add(35, chunk(1.0), generator())
    eps.add(15, chunk(2.0), generator())
    got = recycling.inject(own, noise, 0, generator())
    assert torch.equal(got.start - own.latents, (own.latents + torch.cat((chunk(1), chunk(0)))) - own.latents)
    assert torch.equal(got.eps, noise.eps + torch.cat((chunk(0), chunk(2))))
    assert torch.equal(got.context, own.latents + 1.0)  # of any bucket, for every block
    assert torch.equal(got.levels, noise.levels)


def test_probabilities_and_factors() -> None:
    recycling = ErrorRecycling(RecyclingConfig(), SHIFT)
    recycling.buffers["latent"].add(35, chunk(1.0), generator())
    recycling.buffers["noise"].add(35, chunk(1.0), generator())
    own, draw, hits, factors = clips(1), generator(7), {"eps": 0, "start": 0, "context": 0, "clean": 0}, []
    for _ in range(2000):
        noise = noise_at(own, [[705, 5]])
        got = recycling.inject(own, noise, 0, draw)
        hits["clean"] += recycling.clean[0]
        for name, base in (("eps", noise.eps), ("start", own.latents), ("context", own.latents)):
            moved = (getattr(got, name) - base)[0]
            hits[name] += bool(moved[0].abs().max() > 1e-3)
            if name == "context" and moved[0].abs().max() > 1e-3:
                factors.append(float(moved[0].mean()))
    rates = {name: count / 2000 for name, count in hits.items()}
    assert (
        abs(rates["clean"] - 0.2) < 0.03 and abs(rates["start"] - 0.72) < 0.04 and abs(rates["context"] - 0.72) < 0.04
    )
    assert 0 < rates["eps"] < 0.02
    assert 0.7 - 1e-3 <= min(factors) < 0.75 and 1.25 < max(factors) <= 1.3 + 1e-3


def test_nothing_before_start_and_from_empty_buffers() -> None:
    own = clips()
    noise = noise_at(own, [[100, 600], [400, 999]])
    filled = ErrorRecycling(replace(ALWAYS, start=5), SHIFT)
    for bucket in range(50):
        filled.buffers["latent"].add(bucket, chunk(1.0), generator())
    for recycling, step in ((filled, 4), (ErrorRecycling(ALWAYS, SHIFT), 9)):
        got = recycling.inject(own, noise, step, generator())
        assert torch.equal(got.eps, noise.eps) and torch.equal(got.start, own.latents)
        assert torch.equal(got.context, own.latents)
    assert not torch.equal(filled.inject(own, noise, 5, generator()).context, own.latents)


def test_recording_fills_the_right_buckets_and_clean_samples_rarely_count() -> None:
    own = clips()
    noise = noise_at(own, [[705, 305], [405, 405]])
    recycling = ErrorRecycling(replace(ALWAYS, clean=1.0, update_clean=0.1), SHIFT)
    draw, kept = generator(5), 0
    for step in range(300):
        recycling.inject(own, noise, step, draw)
        before = len(recycling.buffers["latent"])
        recycling.record(own, noise, torch.zeros_like(own.latents), step, draw)
        kept += len(recycling.buffers["latent"]) - before
    assert abs(kept / (300 * 4) - 0.1) < 0.03
    assert {b for b, held in recycling.buffers["noise"].entries.items() if held} == {35, 15, 20}
    soiled = ErrorRecycling(ALWAYS, SHIFT)
    soiled.inject(own, noise, 0, draw)
    soiled.record(own, noise, torch.zeros_like(own.latents), 0, draw)
    assert len(soiled.buffers["latent"]) == len(soiled.buffers["noise"]) == 4
    latent, _ = soiled.errors(own, noise, torch.zeros_like(own.latents))
    assert torch.equal(soiled.buffers["latent"].entries[35][0], latent[0, :FRAMES])


def test_given_and_padded_frames_get_and_leave_no_error() -> None:
    own = clips(1)
    given, valid = torch.zeros(1, CHUNKS * FRAMES, dtype=torch.bool), torch.ones(1, CHUNKS * FRAMES, dtype=torch.bool)
    given[0, 0], valid[0, -1] = True, False
    own = replace(own, given=given, valid=valid)
    recycling, noise = ErrorRecycling(ALWAYS, SHIFT), noise_at(own, [[705, 305]])
    for bucket in (35, 15):
        recycling.buffers["latent"].add(bucket, chunk(1.0), generator())
    got = recycling.inject(own, noise, 0, generator())
    for moved in (got.start, got.context):
        assert torch.equal(moved[0, 0], own.latents[0, 0]) and torch.equal(moved[0, -1], own.latents[0, -1])
        assert not torch.equal(moved[0, 1], own.latents[0, 1])
    recycling.record(own, got, torch.ones_like(own.latents), 0, generator())
    entries = recycling.buffers["noise"].entries
    assert len(entries[35]) == 1 and not entries[15]  # a chunk with padding isn't kept
    assert not entries[35][0][0].any() and entries[35][0][1].any()


def test_full_buckets_forget_at_random_and_copies_are_kept() -> None:
    buffer, draw = ErrorBuffer(2, 3), generator()
    error = chunk(0.0)
    for value in range(50):
        error.fill_(value)
        buffer.add(0, error, draw)
    held = sorted(float(x.flatten()[0]) for x in buffer.entries[0])
    assert len(held) == 3 and len(set(held)) == 3 and held[-1] == 49.0  # the newest always enters
    assert buffer.matched(1, draw) is None and buffer.any(draw) is not None


def test_under_sequence_parallelism_a_rank_keeps_its_buckets_and_looks_at_the_nearest() -> None:
    buffer = ErrorBuffer(8, 5, owner=(1, 4))
    assert buffer.owned == [1, 5]
    buffer.add(2, chunk(9.0), generator())
    assert len(buffer) == 0
    buffer.add(5, chunk(5.0), generator())
    found = buffer.matched(6, generator())
    assert found is not None and float(found.mean()) == 5.0 and buffer.matched(2, generator()) is None


def test_in_the_warm_up_all_ranks_errors_are_kept() -> None:
    own = clips(1)
    noise, recycling = noise_at(own, [[705, 305]]), ErrorRecycling(replace(ALWAYS, warmup=1), SHIFT)
    for step, count in ((0, 4), (1, 6)):
        recycling.inject(own, noise, step, generator())
        recycling.record(own, noise, own.latents, step, generator(), gather=lambda x: torch.cat((x, x)))
        assert len(recycling.buffers["latent"]) == count


def test_state_goes_on_bit_identically() -> None:
    own = clips()
    noise = noise_at(own, [[705, 305], [405, 405]])

    def steps(recycling: ErrorRecycling, draw: torch.Generator, count: int) -> Noise:
        for step in range(count):
            got = recycling.inject(own, noise, step, draw)
            recycling.record(own, got, torch.randn(own.latents.shape, generator=draw), step, draw)
        return got

    config, draw = RecyclingConfig(capacity=2), generator(3)
    first = ErrorRecycling(config, SHIFT)
    steps(first, draw, 6)
    state, place = {k: v.clone() for k, v in first.state().items()}, draw.get_state()
    wanted = steps(first, draw, 3)
    again, resumed = ErrorRecycling(config, SHIFT), generator()
    again.load_state(state)
    resumed.set_state(place)
    got = steps(again, resumed, 3)
    assert all(torch.equal(getattr(got, n), getattr(wanted, n)) for n in ("eps", "start", "context"))
    assert all(torch.equal(value, first.state()[name]) for name, value in again.state().items()) and len(state) == 4
    assert ErrorRecycling(config, SHIFT).state() == {}


def test_memory_and_bad_settings() -> None:
    assert ErrorRecycling(RecyclingConfig(), SHIFT).bytes_at_most((8, 48, 44, 80)) == 2 * 25_000 * 8 * 48 * 44 * 80 * 2
    for bad in ({"capacity": 0}, {"buckets": 0}, {"clean": 1.5}, {"noise": -0.1}):
        with pytest.raises(LongtakeError, match="bad error recycling"):
            RecyclingConfig(**bad)
