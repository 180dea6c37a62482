"""What the backends without engines share: networks called as functions of their spec's inputs, state copied back."""

from __future__ import annotations

import resource
import sys
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from longtake.engines.recipe import Recipe
from longtake.engines.spec import NETWORKS, cache_bindings, network_spec
from longtake.runtime.backends.base import Cache
from longtake.training.presets import Preset

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "int8": torch.int8, "int32": torch.int32}


class HostBackend(ABC):
    """A backend whose networks are pure functions. Subclasses say how one is run."""

    name = ""

    def __init__(self, recipe: Recipe, reason: str, device: torch.device, preset: Preset | None = None) -> None:
        self.recipe, self.preset, self.reason, self.device = recipe, preset or recipe.model, reason, device
        self.specs = {name: network_spec(self.preset, recipe.cache, name) for name in NETWORKS}

    @abstractmethod
    def call(self, network: str, inputs: list[Tensor]) -> list[Tensor]:
        """Run `network` on `inputs`, in the order of its spec; outputs likewise."""

    def text(self, tokens: Tensor) -> Tensor:
        return self.call("text_encoder", [tokens])[0]

    def context(self, embeddings: Tensor) -> list[Tensor]:
        return self.call("context", [embeddings])

    def new_cache(self) -> Cache:
        layers = range(self.preset.dit.layers)
        bindings = [cache_bindings(self.preset, self.recipe.cache, layer) for layer in layers]
        return [
            tuple(torch.zeros([int(n) for n in b.shape], dtype=DTYPES[b.dtype], device=self.device) for b in own)
            for own in bindings
        ]

    def dit(
        self,
        latents_BCFHW: Tensor,
        sinusoid: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        context: list[Tensor],
        cache: Cache,
        table: Tensor,
        write_slot: Tensor,
    ) -> Tensor:
        """See Backend.dit."""
        flat = [tensor for layer in cache for tensor in layer]
        inputs = [latents_BCFHW, sinusoid, rope_cos, rope_sin, table, write_slot, *context, *flat]
        velocity, *written = self.call("dit", inputs)
        slot = int(write_slot)
        if slot >= 0:
            # The network returns whole caches; only the slot it wrote differs, and only that one may change here.
            for tensor, new in zip(flat, written):
                tensor[slot].copy_(new[slot])
        return velocity

    def new_decoder(self) -> HostDecoder:
        return HostDecoder(self)

    def peak_bytes(self) -> int:
        """Peak device memory that torch saw, or peak resident memory of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, except on macOS

    def close(self) -> None:  # noqa: B027  (an override is not required)
        """Nothing to release."""


class HostDecoder:
    """Streaming decode with the caches carried from call to call."""

    def __init__(self, backend: HostBackend) -> None:
        self.backend = backend
        self._caches: list[Tensor] = []

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        network = "vae_steady" if self._caches else "vae_first"
        frames, *self._caches = self.backend.call(network, [latent_BCHW.unsqueeze(2), *self._caches])
        return frames[0]

    def state(self) -> list[Tensor]:
        return self._caches

    def load_state(self, tensors: list[Tensor]) -> None:
        self._caches = [t.to(self.backend.device, torch.float32, copy=True) for t in tensors]
