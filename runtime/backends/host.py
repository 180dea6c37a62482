"""What the backends without engines share: networks are pure functions, and state is copied back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtake.dtypes import DTYPES
from longtake.formats.recipe import Recipe
from longtake.provenance import resident_bytes
from longtake.runtime.backends.base import NO_SLOT, Backend, State
from longtake.training.models.presets import Preset


class HostBackend(Backend):
    """A backend whose networks are pure functions. Subclasses say how one is called."""

    def __init__(
        self,
        recipe: Recipe,
        reason: str,
        device: torch.device,
        preset: Preset | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """`checkpoints`: where what is not a network here comes from (the preset's own folder if None)."""
        self.recipe, self.preset, self.reason, self.device = recipe, preset or recipe.model, reason, device
        self.checkpoints = checkpoints

    @abstractmethod
    def call(self, network: str, inputs: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        """Run `network` on `inputs`, by the names in its spec. Returns its outputs likewise; at least those `wanted`."""

    def has(self, network: str) -> bool:
        """See Backend.has."""
        return network in self.specs

    def stored(self, dtype: str) -> torch.dtype:
        """What the spec's `dtype` is kept in: what is bf16 on a GPU is fp32 here."""
        return DTYPES[dtype].host.torch

    def new_state(self, network: str) -> State:
        """See Backend.new_state."""
        spec = self.specs[network]
        kept = [binding for binding in spec.inputs if binding.name in spec.kept.values()]
        return State(
            {
                b.name: torch.zeros([int(n) for n in b.shape], dtype=self.stored(b.dtype), device=self.device)
                for b in kept
            }
        )

    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """See Backend.run."""
        spec = self.specs[network]
        feeds = {**inputs, **(state.tensors if state else {})}
        if spec.slot and not commit:
            feeds[spec.slot] = NO_SLOT
        kept = spec.kept if state else {}
        results = [binding.name for binding in spec.outputs if binding.name not in kept]
        # What is not committed need not even come back.
        outputs = self.call(network, feeds, [*results, *(kept if commit else ())])
        if state and commit:
            slot = slice(None) if not spec.slot else int(inputs[spec.slot])
            for output, name in kept.items():
                # The network returns state as a whole; only the slot it wrote differs, and only that one may change here.
                held = state.tensors[name]
                place = slot if isinstance(slot, slice) else slot % len(held)  # a state of fewer slots: they take turns
                held[place].copy_(outputs[output][place])
        return {name: outputs[name] for name in results}

    def peak_bytes(self) -> int:
        """Peak device memory that torch saw, or peak resident memory of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes()
