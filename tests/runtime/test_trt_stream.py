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

from longtake.engines.spec import Binding, NetworkSpec
from longtake.runtime.backends.trt_stream import TrtDecoder, TrtStream, caches_in_place

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


def stream_of(network: Causal, in_place: bool) -> TrtStream:
    lane: Any = SimpleNamespace(turn=nullcontext)
    networks = {"vae_first": Causal(), "vae_steady": network}
    return TrtStream(networks, (FIRST, STEADY), allocate, lane, in_place)


def test_the_proof_tells_a_network_that_writes_too_early(caplog: pytest.LogCaptureFixture) -> None:
    assert caches_in_place(Causal(), STEADY, allocate)
    with caplog.at_level(logging.WARNING):
        assert not caches_in_place(Causal(early=True), STEADY, allocate)
    assert "vae_steady cannot write its caches in place" in caplog.text


@pytest.mark.parametrize("network, in_place", [(Causal(), True), (Causal(), False), (Causal(early=True), False)])
def test_frames_and_state_are_those_of_the_whole_clip(network: Causal, in_place: bool) -> None:
    decoder = TrtDecoder(stream_of(network, in_place))
    assert decoder.state() == []
    latents = torch.randn(6, 1, 1, 5, 1)
    padded = torch.cat([torch.zeros(2, 5), latents.view(6, 5)])
    for i, latent in enumerate(latents):
        assert torch.allclose(decoder.decode(latent).flatten(), padded[i : i + 3].sum(dim=0))
    (state,) = decoder.state()
    assert torch.equal(state[0], latents.view(6, 5)[-2:])


def test_a_loaded_state_goes_on_and_an_empty_one_starts_anew() -> None:
    one, other = (TrtDecoder(stream_of(Causal(), True)) for _ in range(2))
    latents = torch.randn(4, 1, 1, 5, 1)
    for latent in latents[:3]:
        one.decode(latent)
    other.load_state([tensor.clone() for tensor in one.state()])
    assert torch.equal(one.decode(latents[3]).clone(), other.decode(latents[3]))
    other.load_state([])
    assert torch.equal(other.decode(latents[0]).flatten(), latents[0].flatten())
