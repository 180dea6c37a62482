"""Streaming VAE networks on TensorRT plans: feature caches in place where the plan allows it.

A causal convolution's new cache is the end of [old cache, input], the very tensor the convolution reads, which
TensorRT lays out as a whole: so writing the new cache over the old one is mostly harmless. Not always: where a step
brings fewer frames than the cache holds, the new cache is the old one shifted, and a kernel that shifts in place reads
what it has just overwritten; and a plan may write an output before it has read the input. No plan promises anything,
but it runs the same kernels in the same order every time, so a few runs tell which caches need a second buffer
(`caches_kept_twice`). At 704x1280 the caches are 3.2 GB, which a whole second set would double; cutting the network at
every convolution instead, to update caches by a kernel, would make TensorRT leave its own tensor layout at each cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.runtime.backends.base import State
from longtake.runtime.backends.segments.network import same_bytes
from longtake.runtime.backends.trt.networks import Network
from longtake.runtime.backends.trt.stream_lock import StreamLock
from longtake.training.models.network_spec import Binding, NetworkSpec

log = logging.getLogger(__name__)

Allocate = Callable[[Binding], Tensor]
SETTLING_RUNS = 6


@torch.no_grad()
def caches_kept_twice(network: Network, spec: NetworkSpec, allocate: Allocate) -> frozenset[str]:
    """Names of the caches that `network` may not write over their input: with all others in place its results are the
    same, to the last bit, as with none. Runs on torch's current stream; needs two sets of caches for a moment.
    """
    if not spec.carried:  # our kernels write all of them in place, and only so
        return frozenset()
    trial = _Trial(network, spec, allocate)
    if not trial.settles():
        log.warning("%s does not give the same bits twice, so its caches are kept twice", spec.name)
        return frozenset(trial.names)
    twice: set[str] = set()
    for _ in trial.names:
        try:
            wrong = trial.first_difference(twice)
        except LongtakeError as error:
            log.warning("%s cannot write its caches in place, they are kept twice: %s", spec.name, error)
            return frozenset(trial.names)
        if wrong is None:
            break
        # What differs first is either shifted in place, or computed from the cache before it, overwritten too early.
        suspects = [name for name in trial.names[max(0, wrong - 1) : wrong + 1] if name not in twice]
        twice |= set(suspects or [name for name in trial.names if name not in twice][:1])
    if twice:
        log.info("%s keeps %d of %d caches twice: %s", spec.name, len(twice), len(trial.names), sorted(twice))
    return frozenset(twice)


class _Trial:
    """One step on random tensors with every cache apart, to compare others with."""

    def __init__(self, network: Network, spec: NetworkSpec, allocate: Allocate) -> None:
        self.network, self.pairs = network, list(spec.kept.items())
        self.names = [name for _, name in self.pairs]
        self._bindings = {b.name: b for b in (*spec.inputs, *spec.outputs)}
        self._allocate = allocate
        outputs = {out for out, _ in self.pairs}
        self._given = [b.name for b in spec.inputs if b.name not in self.names]
        self._made = [b.name for b in spec.outputs if b.name not in outputs]
        self._data = {name: random_like(self._new(name), i) for i, name in enumerate(self._given)}
        self._old = {name: self._new(name) for name in self.names}
        self._apart = {name: self._new(name) for name in (*outputs, *self._made)}
        self._over = {name: self._new(name) for name in self._made}

    def settles(self) -> bool:
        """Run with every cache apart until two runs agree: an engine may change its kernels after the first ones."""
        sums: list[int] = []
        for _ in range(SETTLING_RUNS):
            self._run(self._apart)
            last, sums = sums, [int(t.view(torch.int8).sum(dtype=torch.int64)) for t in self._apart.values()]
            if sums == last:
                return True
        return False

    def _new(self, name: str) -> Tensor:
        return self._allocate(self._bindings[name])

    def _run(self, outputs: Mapping[str, Tensor]) -> None:
        for i, name in enumerate(self.names):
            random_like(self._old[name], 100 + i)
        self.network.run({**self._data, **self._old, **outputs})

    def first_difference(self, twice: set[str]) -> int | None:
        """Index of the first cache that comes out wrong when only `twice` are apart (their number if a result does)."""
        outputs = {out: self._new(name) if name in twice else self._old[name] for out, name in self.pairs}
        self._run({**outputs, **self._over})
        # Bytes, not numbers: NaNs, which random weights may bring about, equal nothing.
        for i, (out, _) in enumerate(self.pairs):
            if not same_bytes(outputs[out], self._apart[out]):
                return i
        return None if all(same_bytes(self._over[n], self._apart[n]) for n in self._made) else len(self.pairs)


def random_like(tensor: Tensor, seed: int) -> Tensor:
    """`tensor` filled with normal numbers, so that anything that is overwritten too early shows."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return tensor.normal_(generator=generator)


class StreamState(State):
    """The caches between a network for the first call of a stream and one for all later ones, and their buffers.

    `tensors` are the caches that the last call wrote. An encoder's networks live no longer than its state.

    Args:
        twice: the caches that the steady network may not write over the old ones: two buffers take turns.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        specs: tuple[NetworkSpec, NetworkSpec],
        allocate: Allocate,
        lock: StreamLock,
        twice: frozenset[str],
    ) -> None:
        self.networks, self.lock = networks, lock
        self.first, self.steady = specs
        caches = {*self.steady.kept, *self.steady.kept.values()}
        kept = [b for b in self.steady.inputs if b.name in caches]
        super().__init__({b.name: allocate(b) for b in kept})
        self._after = self.tensors | {b.name: allocate(b) for b in kept if b.name in twice}
        # A step's input and output may differ in size between the first call and the later ones; all buffers stay.
        self._io: dict[str, tuple[str, Tensor, str, Tensor]] = {}
        for spec in specs:
            ((given, made),) = zip(*([b for b in side if b.name not in caches] for side in (spec.inputs, spec.outputs)))
            self._io[spec.name] = given.name, allocate(given), made.name, allocate(made)

    def sizes(self) -> dict[str, int]:
        """Bytes by the name of the memory budget's term."""
        caches = {t.data_ptr(): t.nbytes for t in (*self.tensors.values(), *self._after.values())}
        buffers = sum(given.nbytes + made.nbytes for _, given, _, made in self._io.values())
        return {"VAE caches": sum(caches.values()), "decode buffers": buffers}

    def run(self, network: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the first or the steady network on its one input; its result is a buffer that the next call overwrites."""
        given_name, given, made_name, made = self._io[network]
        bound = {given_name: given, made_name: made}
        bound |= self.tensors if network == self.steady.name else {}
        bound |= {out: self._after[name] for out, name in self.steady.kept.items()}
        with self.lock.hold():
            given.copy_(inputs[given_name], non_blocking=True)
            self.networks[network].run(bound)
        self.tensors, self._after = self._after, self.tensors
        return {made_name: made}
