"""What the backends without engines share: networks called by their spec's names, state copied back."""

from __future__ import annotations

import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtake.dtypes import DTYPES
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.base import Cache, Encoder
from longtake.runtime.backends.torch_parts import TextRunner, TorchEncoder, text_runner, vae_from_checkpoints
from longtake.training.models.presets import Preset
from longtake.training.models.wan.spec import NETWORKS, cache_bindings, context_bindings, network_spec


class HostBackend(ABC):
    """A backend whose networks are pure functions. Subclasses say how one is run."""

    name = ""

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
        self._text: TextRunner | None = None
        self.specs = {name: network_spec(self.preset, recipe.cache, name, vae_ops=recipe.vae_ops) for name in NETWORKS}

    @abstractmethod
    def call(
        self, network: str, inputs: Mapping[str, Tensor], wanted: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Run `network` on `inputs`, by the names in its spec. Returns its outputs likewise; at least those `wanted`."""

    def text(self, tokens: Tensor) -> Tensor:
        """See Backend.text; a text encoder that is no network of the export runs in PyTorch."""
        if not self.has("text_encoder"):
            if self._text is None:
                self._text = text_runner(self.preset, self.checkpoints, self.device)
            return self._text(tokens)
        return self._only_output("text_encoder", tokens)

    def has(self, network: str) -> bool:
        """Whether `network` can be called here."""
        return network in self.specs

    def _only_output(self, network: str, tensor: Tensor) -> Tensor:
        spec = self.specs[network]
        return self.call(network, {spec.inputs[0].name: tensor})[spec.outputs[0].name]

    def context(self, embeddings: Tensor) -> list[Tensor]:
        """See Backend.context."""
        spec = self.specs["context"]
        outputs = self.call("context", {spec.inputs[0].name: embeddings})
        return [outputs[binding.name] for binding in spec.outputs]

    def new_cache(self) -> Cache:
        layers = range(self.preset.dit.layers)
        bindings = [cache_bindings(self.preset, self.recipe.cache, layer) for layer in layers]
        return [
            tuple(
                torch.zeros([int(n) for n in b.shape], dtype=DTYPES[b.dtype].host.torch, device=self.device)
                for b in own
            )
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
        spec = self.specs["dit"]
        names = [binding.name for binding in context_bindings(self.preset)]
        own = dict(zip((source for _, source in spec.aliases), (t for layer in cache for t in layer), strict=True))
        inputs = {"latents": latents_BCFHW, "timestep_sinusoid": sinusoid, "rope_cos": rope_cos, "rope_sin": rope_sin,
                  "table": table, "write_slot": write_slot, **dict(zip(names, context, strict=True)), **own}  # fmt: skip
        slot = int(write_slot)
        # Without a slot nothing is written: the caches need not even come back.
        outputs = self.call("dit", inputs, ["velocity"] if slot < 0 else None)
        for out, source in spec.aliases if slot >= 0 else ():
            # The network returns whole caches; only the slot it wrote differs, and only that one may change here.
            own[source][slot].copy_(outputs[out][slot])
        return outputs["velocity"]

    def new_decoder(self) -> HostDecoder:
        """See Backend.new_decoder."""
        return HostDecoder(HostStream(self, "vae_first", "vae_steady"))

    def new_encoder(self) -> Encoder:
        """See Backend.new_encoder; an encoder that is no network of the export runs in PyTorch."""
        if self.has("vae_encoder_first") and self.has("vae_encoder_steady"):
            return HostEncoder(HostStream(self, "vae_encoder_first", "vae_encoder_steady"))
        return TorchEncoder(vae_from_checkpoints(self.preset, self.checkpoints), self.device)

    def peak_bytes(self) -> int:
        """Peak device memory that torch saw, or peak resident memory of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, except on macOS

    def close(self) -> None:  # noqa: B027  (an override is not required)
        """Nothing to release."""


class HostStream:
    """Two networks, for the first call of a stream and for all later ones; caches are carried from call to call."""

    def __init__(self, backend: HostBackend, first: str, steady: str) -> None:
        self.backend, self.first, self.steady = backend, first, steady
        self.caches: dict[str, Tensor] = {}

    @property
    def cache_names(self) -> list[str]:
        return [binding.name for binding in self.backend.specs[self.steady].inputs[1:]]

    def step(self, tensor: Tensor) -> Tensor:
        """The first output for the first input `tensor`."""
        name = self.steady if self.caches else self.first
        spec = self.backend.specs[name]
        outputs = self.backend.call(name, {spec.inputs[0].name: tensor, **self.caches})
        # A cache leaves as "<name>_out", whether the spec lets it be written in place or not.
        self.caches = {cache: outputs[f"{cache}_out"] for cache in self.cache_names}
        return outputs[spec.outputs[0].name]


class HostDecoder:
    """Streaming decode with the caches carried from call to call."""

    def __init__(self, stream: HostStream) -> None:
        self.stream = stream

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        return self.stream.step(latent_BCHW.unsqueeze(2))[0]

    def state(self) -> list[Tensor]:
        return list(self.stream.caches.values())

    def load_state(self, tensors: list[Tensor]) -> None:
        own = [t.to(self.stream.backend.device, torch.float32, copy=True) for t in tensors]
        self.stream.caches = dict(zip(self.stream.cache_names, own, strict=True)) if own else {}


class HostEncoder:
    """Streaming encode with the caches carried from call to call."""

    def __init__(self, stream: HostStream) -> None:
        self.stream = stream

    def encode(self, frames_CTHW: Tensor) -> Tensor:
        return self.stream.step(frames_CTHW[None].to(self.stream.backend.device))[:, :, 0]
