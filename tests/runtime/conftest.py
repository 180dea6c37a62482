"""A deterministic toy backend: cheap arithmetic that depends on everything a session passes, so that mistakes show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.formats.recipe import recipe_named
from longtake.runtime.backends.base import Cache
from longtake.runtime.generator import Generator
from longtake.training.models.presets import TINY


class ToyDecoder:
    """Frames of flat colour; each depends on all latents before it."""

    def __init__(self, backend: ToyBackend) -> None:
        self.backend = backend
        self.memory: list[Tensor] = []

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        assert latent_BCHW.shape == (1, 16, 8, 8)
        self.backend.on_decode()
        mean = latent_BCHW.mean(dim=(0, 2, 3))[:3]
        frames = 4 if self.memory else 1
        old = self.memory[0] if self.memory else torch.zeros(3)
        self.memory = [0.5 * old + mean]
        return self.memory[0].tanh().view(3, 1, 1, 1).expand(3, frames, 128, 128)

    def state(self) -> list[Tensor]:
        return self.memory

    def load_state(self, tensors: list[Tensor]) -> None:
        self.memory = [tensor.float().clone() for tensor in tensors]


class ToyBackend:
    """Implements runtime.backends.base.Backend. `fail_at(n)` makes the n-th network call from now raise."""

    name, reason, flavour = "toy", "made for tests", ""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.preset, self.recipe = TINY, recipe_named("tiny_bf16_sm90")
        self.caches: list[Cache] = []
        self.calls: list[dict[str, Any]] = []
        self.hook: Callable[[int], None] = lambda call: None
        self.on_decode: Callable[[], None] = lambda: None
        self.count = 0
        self._velocity = torch.empty(1, 16, 8, 8, 8)

    def _tick(self) -> None:
        self.count += 1
        self.hook(self.count)

    def fail_at(self, number: int, error: BaseException) -> None:
        """Raise `error` in the `number`-th call from now (1 = the next one), once."""
        target = self.count + number

        def hook(call: int) -> None:
            if call == target:
                raise error

        self.hook = hook

    def text(self, tokens: Tensor) -> Tensor:
        assert tokens.dtype == torch.int32 and tokens.shape == (1, 32)
        self._tick()
        return tokens.float()[..., None].expand(1, 32, 128) / 100

    def context(self, embeddings: Tensor) -> list[Tensor]:
        self._tick()
        return [embeddings.mean() * (layer + 1) * torch.ones(2) for layer in range(2)]

    def new_cache(self) -> Cache:
        self.caches.append([(torch.zeros(4, 6),) for _ in range(2)])
        return self.caches[-1]

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
        assert latents_BCFHW.shape == (1, 16, 8, 8, 8) and latents_BCFHW.dtype == torch.float32
        assert sinusoid.shape == (8, 256) and rope_cos.shape == rope_sin.shape == (128, 32)
        assert table.dtype == write_slot.dtype == torch.int32
        self.calls.append({"table": table.tolist(), "write_slot": write_slot.tolist()})
        fresh = torch.stack([latents_BCFHW.mean(), latents_BCFHW[0, 0, 0, 0, 0], rope_cos.mean(), rope_sin.mean(),
                             sinusoid.mean(), context[0][0]])  # fmt: skip
        slot = int(write_slot[0])
        total = torch.zeros(6)
        for layer, (tensor,) in enumerate(cache):
            for entry in table.tolist():
                total += (layer + 1) * (fresh if entry < 0 else tensor[entry])
            if slot >= 0:
                tensor[slot] = 0.5  # half-written, should the pass fail now
        self._tick()
        if slot >= 0:
            for layer, (tensor,) in enumerate(cache):
                tensor[slot] = fresh + layer
        self._velocity.copy_(latents_BCFHW * 0.3 + total.sum().sin())  # one buffer, overwritten by the next call
        return self._velocity

    def new_decoder(self) -> ToyDecoder:
        return ToyDecoder(self)

    def peak_bytes(self) -> int:
        return 123_000_000

    def close(self) -> None:
        pass


def toy_tokenize(texts: list[str], length: int) -> Tensor:
    """One token a character."""
    rows = torch.zeros(len(texts), length, dtype=torch.int32)
    for row, text in zip(rows, texts):
        codes = [ord(letter) % 97 + 1 for letter in text][:length]
        row[: len(codes)] = torch.tensor(codes, dtype=torch.int32)
    return rows


@pytest.fixture
def toy() -> ToyBackend:
    """A fresh toy backend."""
    return ToyBackend()


@pytest.fixture
def make_toy() -> Callable[[], ToyBackend]:
    """Makes toy backends."""
    return ToyBackend


@pytest.fixture
def make_generator() -> Callable[[ToyBackend], Generator]:
    """Wraps a toy backend in a generator."""
    return lambda backend: Generator(backend, toy_tokenize)
