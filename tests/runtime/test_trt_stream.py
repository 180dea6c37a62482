"""Streams of VAE networks: caches in place where a network stands it, and the proof that tells."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.runtime.backends.trt.vae_stream import StreamState, caches_kept_twice
from longtake.runtime.video_model import NetworkDecoder
from longtake.training.models.network_spec import Binding, NetworkSpec

CACHE = Binding("cache", "fp32", (1, 2, 5))
OUT = Binding("cache_out", "fp32", (1, 2, 5))
LATENT = Binding("latent", "fp32", (1, 1, 1, 5, 1))
FRAMES = Binding("frames", "fp32", (1, 1, 1, 5, 1))
FIRST = NetworkSpec("vae_first", (LATENT,), (FRAMES, OUT), carried=(("cache_out", "cache"),))
STEADY = NetworkSpec("vae_steady", (LATENT, CACHE), (FRAMES, OUT), carried=(("cache_out", "cache"),))


class Causal:
    """Sums the last three inputs. `early`: write the new cache before the old one has been read to the end."""

    def __init__(self, early: bool = False) -> None:
        self.early = early

    def prepare(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        old = tensors.get("cache", torch.zeros(1, 2, 5))
        x = tensors["latent"].view(1, 1, 5)
        if self.early:
            tensors["cache_out"].copy_(torch.cat([old[:, 1:].clone(), x], dim=1))
        extended = torch.cat([old, x], dim=1)
        tensors["frames"].copy_(extended.sum(dim=1).view(1, 1, 1, 5, 1))
        tensors["cache_out"].copy_(extended[:, 1:] if not self.early else tensors["cache_out"].clone())


def allocate(binding: Binding, **options: Any) -> Tensor:
    return torch.full([int(n) for n in binding.shape], float("nan"))


def decoder_of(network: Causal, in_place: bool) -> NetworkDecoder:
    """A decoder on the stream's state, as a backend on TensorRT plans makes it."""
    lock: Any = SimpleNamespace(hold=nullcontext)
    networks = {"vae_first": Causal(), "vae_steady": network}
    twice = frozenset[str]() if in_place else frozenset({"cache"})
    backend: Any = SimpleNamespace(
        specs={"vae_first": FIRST, "vae_steady": STEADY},
        new_state=lambda name: StreamState(networks, (FIRST, STEADY), allocate, lock, twice),
        run=lambda name, inputs, state: state.run(name, inputs),
    )
    return NetworkDecoder(backend)


def test_a_network_that_writes_too_early_needs_two_buffers(caplog: pytest.LogCaptureFixture) -> None:
    assert not caches_kept_twice(Causal(), STEADY, allocate)
    with caplog.at_level(logging.INFO):
        assert caches_kept_twice(Causal(early=True), STEADY, allocate) == {"cache"}
    assert "vae_steady keeps 1 of 1 caches twice" in caplog.text


class Settling(Causal):
    """Gives other bits in its first runs, as an engine does that compiles better kernels meanwhile; or always."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.left = runs

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        super().run(tensors, write)
        self.left -= 1
        if self.left >= 0:
            tensors["frames"].add_(torch.rand(1))


def test_a_network_is_judged_once_it_gives_the_same_bits(caplog: pytest.LogCaptureFixture) -> None:
    assert not caches_kept_twice(Settling(2), STEADY, allocate)
    assert caches_kept_twice(Settling(100), STEADY, allocate) == {"cache"}
    assert "does not give the same bits twice" in caplog.text


class Chain:
    """Three running sums one after another; some write their new cache before they have read the old one."""

    def __init__(self, early: set[int]) -> None:
        self.stages = [Causal(early=i in early) for i in range(3)]

    def prepare(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        x = tensors["latent"].clone()
        for i, stage in enumerate(self.stages):
            made = torch.empty_like(x)
            own = {"latent": x, "frames": made, "cache": tensors[f"c{i}"], "cache_out": tensors[f"c{i}_out"]}
            stage.run(own)
            x = made
        tensors["frames"].copy_(x)


@pytest.mark.parametrize("early", [set(), {0}, {1}, {2}, {0, 1}, {0, 2}, {0, 1, 2}])
def test_only_the_caches_that_need_it_are_kept_twice(early: set[int]) -> None:
    caches = [Binding(f"c{i}", "fp32", (1, 2, 5)) for i in range(3)]
    outs = [Binding(f"c{i}_out", "fp32", (1, 2, 5)) for i in range(3)]
    pairs = tuple((f"c{i}_out", f"c{i}") for i in range(3))
    spec = NetworkSpec("vae_steady", (LATENT, *caches), (FRAMES, *outs), carried=pairs)
    twice = {int(name[1:]) for name in caches_kept_twice(Chain(early), spec, allocate)}
    assert early <= twice and (early or not twice) and len(twice) <= 2 * len(early)


@pytest.mark.parametrize("network, in_place", [(Causal(), True), (Causal(), False), (Causal(early=True), False)])
def test_frames_and_state_are_those_of_the_whole_clip(network: Causal, in_place: bool) -> None:
    decoder = decoder_of(network, in_place)
    assert decoder.state() == []
    latents = torch.randn(6, 1, 1, 5, 1)
    padded = torch.cat([torch.zeros(2, 5), latents.view(6, 5)])
    for i, latent in enumerate(latents):
        assert torch.allclose(decoder.decode(latent).flatten(), padded[i : i + 3].sum(dim=0))
    (state,) = decoder.state()
    assert torch.equal(state[0], latents.view(6, 5)[-2:])


def test_a_loaded_state_goes_on_and_an_empty_one_starts_anew() -> None:
    one, other = (decoder_of(Causal(), True) for _ in range(2))
    latents = torch.randn(4, 1, 1, 5, 1)
    for latent in latents[:3]:
        one.decode(latent)
    other.load_state([tensor.clone() for tensor in one.state()])
    assert torch.equal(one.decode(latents[3]).clone(), other.decode(latents[3]))
    other.load_state([])
    assert torch.equal(other.decode(latents[0]).flatten(), latents[0].flatten())
