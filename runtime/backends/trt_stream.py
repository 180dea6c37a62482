"""Streaming VAE networks on TensorRT plans: feature caches in place where the plan allows it.

A causal convolution's new cache is the end of [old cache, input], the very tensor the convolution reads, which
TensorRT lays out as a whole: so writing the new cache over the old one is harmless, unless the plan writes an output
before it has read the input. No plan promises not to, but a plan runs the same kernels in the same order every time,
so one run tells (`caches_in_place`). At 704x1280 the caches are 3.2 GB, which a second set would double; cutting the
network at every convolution instead, to update caches by a kernel, would make TensorRT leave its own tensor layout at
each cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from longtake.engines.spec import Binding, NetworkSpec
from longtake.runtime.backends.lane import Lane
from longtake.runtime.backends.segmented_network import same_bytes
from longtake.runtime.errors import LongtakeError

log = logging.getLogger(__name__)

Allocate = Callable[[Binding], Tensor]


class Network(Protocol):
    """A network on the device, whole or cut."""

    def prepare(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None: ...


def carried_pairs(spec: NetworkSpec) -> list[tuple[str, str]]:
    """(output, input of the next call) of every cache."""
    return [*spec.carried, *spec.aliases]


@torch.no_grad()
def caches_in_place(network: Network, spec: NetworkSpec, allocate: Allocate) -> bool:
    """Whether `network` gives the same results, to the last bit, when each cache is written over its input.

    Runs on torch's current stream. Needs two sets of caches for a moment.
    """
    pairs = carried_pairs(spec)
    sources = {name for _, name in pairs}
    bindings = {b.name: b for b in (*spec.inputs, *spec.outputs)}
    data = {b.name: random_like(allocate(b), seed) for seed, b in enumerate(spec.inputs) if b.name not in sources}
    results = [b.name for b in spec.outputs if b.name not in {out for out, _ in pairs}]
    old = {name: random_like(allocate(bindings[name]), 100 + i) for i, (_, name) in enumerate(pairs)}
    new = {out: allocate(bindings[out]) for out, _ in pairs}
    apart = {name: allocate(bindings[name]) for name in results}
    over = {name: allocate(bindings[name]) for name in results}
    network.run({**data, **old, **new, **apart})
    try:
        network.run({**data, **old, **{out: old[name] for out, name in pairs}, **over})
    except LongtakeError as error:
        log.warning("%s cannot write its caches in place, they are kept twice: %s", spec.name, error)
        return False
    compared = [(name, old[name], new[out]) for out, name in pairs] + [(n, apart[n], over[n]) for n in results]
    # Bytes, not numbers: NaNs, which random weights may bring about, equal nothing.
    differing = [name for name, a, b in compared if not same_bytes(a, b)]
    if differing:
        log.warning("%s cannot write its caches in place, they are kept twice: %s differ", spec.name, differing[:3])
    return not differing


def random_like(tensor: Tensor, seed: int) -> Tensor:
    """`tensor` filled with normal numbers, so that anything that is overwritten too early shows."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return tensor.normal_(generator=generator)


class TrtStream:
    """A network for the first call of a stream, one for all later ones, and the caches between them.

    Args:
        in_place: whether the steady network may write caches over the old ones; else two sets take turns.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        specs: tuple[NetworkSpec, NetworkSpec],
        allocate: Allocate,
        lane: Lane,
        in_place: bool,
    ) -> None:
        self.networks, self.lane = networks, lane
        self.first, self.steady = specs
        self._pairs = carried_pairs(self.steady)
        caches = {name for pair in self._pairs for name in pair}
        kept = [b for b in self.steady.inputs if b.name in caches]
        sets = [{b.name: allocate(b) for b in kept} for _ in range(1 if in_place else 2)]
        self._before, self._after = sets[0], sets[-1]
        # A step's input and output may differ in size between the first call and the later ones; all buffers stay.
        self._io: dict[str, tuple[str, Tensor, str, Tensor]] = {}
        for spec in specs:
            ((given, made),) = zip(*([b for b in side if b.name not in caches] for side in (spec.inputs, spec.outputs)))
            self._io[spec.name] = given.name, allocate(given), made.name, allocate(made)
        self.started = False

    @torch.no_grad()
    def step(self, tensor: Tensor) -> Tensor:
        """The first output, a buffer that the next call overwrites, for `tensor` of the first input's shape."""
        spec = self.steady if self.started else self.first
        given_name, given, made_name, made = self._io[spec.name]
        bound = {given_name: given, made_name: made}
        bound |= self._before if self.started else {}
        bound |= {out: self._after[name] for out, name in self._pairs}
        with self.lane.turn():
            given.copy_(tensor, non_blocking=True)
            self.networks[spec.name].run(bound)
        self._before, self._after = self._after, self._before
        self.started = True
        return made

    def state(self) -> list[Tensor]:
        """The caches in spec order, not copied; an empty list before the first step."""
        return list(self._before.values()) if self.started else []

    def load_state(self, tensors: list[Tensor]) -> None:
        """Continue from caches that `state` gave, copied; an empty list starts anew."""
        self.started = bool(tensors)
        for own, given in zip(self._before.values(), tensors, strict=False):
            own.copy_(given)


class TrtDecoder:
    """Decoder (see base.py) on a stream of `vae_first` and `vae_steady`."""

    def __init__(self, stream: TrtStream) -> None:
        self._stream = stream

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """See Decoder.decode: fp32 [1, C, H, W] to fp32 [3, T, H, W], a buffer that the next call overwrites."""
        return self._stream.step(latent_BCHW[:, :, None])[0]

    def state(self) -> list[Tensor]:
        """See Decoder.state."""
        return self._stream.state()

    def load_state(self, tensors: list[Tensor]) -> None:
        """See Decoder.load_state."""
        self._stream.load_state(tensors)


class TrtEncoder:
    """Encoder (see base.py) on a stream of `vae_encoder_first` and `vae_encoder_steady`."""

    def __init__(self, stream: TrtStream) -> None:
        self._stream = stream

    def encode(self, frames_CTHW: Tensor) -> Tensor:
        """See Encoder.encode: fp32 [3, T, H, W] to fp32 [1, C, h, w]."""
        return self._stream.step(frames_CTHW[None])[:, :, 0]
