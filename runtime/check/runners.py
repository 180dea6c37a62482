"""A runtime backend as one more way in which a network runs (see longtake/accuracy/runners.py)."""

from __future__ import annotations

import torch

from longtake.accuracy.runners import Feeds
from longtake.runtime.backends.base import Backend, State
from longtake.training.models.network_spec import NetworkSpec


class BackendRunner:
    """One network of a backend, with its state set from the feeds."""

    def __init__(self, backend: Backend, spec: NetworkSpec) -> None:
        self.backend, self.spec, self.name = backend, spec, backend.name

    @torch.no_grad()
    def __call__(self, feeds: Feeds) -> Feeds:
        state = self._state(feeds)
        held = state.tensors if state else {}
        # The slot stays on the host, see Backend.run.
        device = self.backend.device
        inputs = {n: t if n == self.spec.slot else t.to(device) for n, t in feeds.items() if n not in held}
        commit = not self.spec.slot or int(feeds[self.spec.slot]) >= 0
        outputs = dict(self.backend.run(self.spec.name, inputs, state, commit))
        outputs |= {out: held[name] for out, name in self.spec.kept.items()} if state else {}
        on_host = {b.name: outputs[b.name].detach().cpu().reshape(_sizes(b.shape)) for b in self.spec.outputs}
        return {name: t.clone() if t.dtype == torch.int8 else t.float().clone() for name, t in on_host.items()}

    def _state(self, feeds: Feeds) -> State | None:
        """A state that holds what the feeds say of it; None if the network keeps nothing."""
        if not self.spec.kept:
            return None
        state = self.backend.new_state(self.spec.name.replace("_first", "_steady"))
        for name, tensor in state.tensors.items():
            if name in feeds:
                tensor.copy_(feeds[name])
        return state


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(size, str) else size for size in shape)
