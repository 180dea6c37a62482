"""A backend with a stopwatch: the session runs unchanged, every pass and every decoded latent is timed by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longtake.runtime.backends.base import Backend, State
from longtake.runtime.bench.gpu import synchronize
from longtake.runtime.clock import StageClock
from longtake.training.models.random_weights import seed_of

TEXT = "text_encoder"
MARKS = {"context": "context", "camera": "camera", "vae_encoder_first": "picture"}


class TimedBackend(Backend):
    """Around another one; marks: "denoise_pass", "clean_pass", "context", "camera", "picture", and of decoders "latent".

    The prompt's embeddings are random, so that no text encoder is needed.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner, self.name, self.reason = inner, inner.name, inner.reason
        self.device, self.decode_device = inner.device, inner.decode_device
        self.preset, self.recipe, self.checkpoints = inner.preset, inner.recipe, inner.checkpoints
        self._clock, self._decode_clock = StageClock(inner.device), StageClock(inner.decode_device)

    def taken(self) -> dict[str, list[float]]:
        """Milliseconds of every pass since the last call, by mark; waits for both devices."""
        synchronize(self.device)
        synchronize(self.decode_device)
        return self._clock.take() | self._decode_clock.take()

    def has(self, network: str) -> bool:
        """See Backend.has."""
        return network == TEXT or self.inner.has(network)

    def new_state(self, network: str) -> State:
        """See Backend.new_state."""
        return self.inner.new_state(network)

    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """See Backend.run."""
        if network == TEXT:
            return {self.specs[TEXT].outputs[0].name: self._embeddings()}
        clock = self._decode_clock if network.startswith("vae") else self._clock
        label = MARKS.get(network, "latent") if network != "dit" else "clean_pass" if commit else "denoise_pass"
        with clock.stage(label):
            return self.inner.run(network, inputs, state, commit)

    def _embeddings(self) -> Tensor:
        """Random embeddings, fp32 [1, E, text_dim], the same for every prompt."""
        config = self.preset.text
        generator = torch.Generator().manual_seed(seed_of("embeddings"))
        return torch.randn(1, config.length, config.dim, generator=generator).to(self.device)

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes."""
        return self.inner.peak_bytes()
