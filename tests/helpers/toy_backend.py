"""A deterministic toy backend: cheap arithmetic that depends on everything a session passes, so that mistakes show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longtake.formats.recipe import recipe_named
from longtake.runtime.backends.base import Backend, State
from longtake.runtime.video_model import Tensors
from longtake.training.models.presets import TINY


class ToyBackend(Backend):
    """`fail_at(n)` makes the n-th network call from now raise. `new_encoder` is what makes an encoder, if it has one."""

    name, reason, flavour = "toy", "made for tests", ""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.preset, self.recipe = TINY, recipe_named("tiny_bf16_sm90")
        self.states: list[State] = []
        self.calls: list[dict[str, Any]] = []
        self.hook: Callable[[int], None] = lambda call: None
        self.on_decode: Callable[[], None] = lambda: None
        self.new_encoder: Callable[[], Any] | None = None
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

    def has(self, network: str) -> bool:
        return self.new_encoder is not None or not network.startswith("vae_encoder")

    def new_state(self, network: str) -> State:
        if network == "dit":
            self.states.append(State({f"layer_{layer}": torch.zeros(4, 6) for layer in range(2)}))
            return self.states[-1]
        return (
            EncoderState(self.new_encoder())
            if self.new_encoder and "encoder" in network
            else State({"memory": torch.zeros(3)})
        )

    def run(self, network: str, inputs: Tensors, state: State | None = None, commit: bool = True) -> Tensors:
        if isinstance(state, EncoderState):
            return {"latent": state.encoder.encode(inputs["frames"][0])[:, :, None]}
        if network == "dit":
            assert state is not None
            return {"velocity": self.dit(inputs["latents"], inputs, state, commit)}
        if network.startswith("vae"):
            assert state is not None
            return {"frames": self.decode(inputs["latent"], state, frames=4 if network == "vae_steady" else 1)}
        return self.text(inputs["tokens"]) if network == "text_encoder" else self.context(inputs["embeddings"])

    def text(self, tokens: Tensor) -> Tensors:
        assert tokens.dtype == torch.int32 and tokens.shape == (1, 32)
        self._tick()
        return {"embeddings": tokens.float()[..., None].expand(1, 32, 128) / 100}

    def context(self, embeddings: Tensor) -> Tensors:
        self._tick()
        return {f"context_{layer}": embeddings.mean() * (layer + 1) * torch.ones(2) for layer in range(2)}

    def dit(self, latents_BCFHW: Tensor, inputs: Tensors, state: State, commit: bool) -> Tensor:
        table, slot = inputs["table"], int(inputs["write_slot"])
        rope_cos, rope_sin, sinusoid = inputs["rope_cos"], inputs["rope_sin"], inputs["timestep_sinusoid"]
        assert latents_BCFHW.shape == (1, 16, 8, 8, 8) and latents_BCFHW.dtype == torch.float32
        assert sinusoid.shape == (8, 256) and rope_cos.shape == rope_sin.shape == (128, 32)
        assert table.dtype == inputs["write_slot"].dtype == torch.int32 and slot not in table.tolist()
        self.calls.append({"table": table.tolist(), "write_slot": [slot if commit else -1]})
        fresh = torch.stack([latents_BCFHW.mean(), latents_BCFHW[0, 0, 0, 0, 0], rope_cos.mean(), rope_sin.mean(),
                             sinusoid.mean(), inputs["context_0"][0]])  # fmt: skip
        total = torch.zeros(6)
        for layer, tensor in enumerate(state.tensors.values()):
            for entry in table.tolist():
                total += (layer + 1) * (fresh if entry < 0 else tensor[entry])
            if commit:
                tensor[slot] = 0.5  # half-written, should the pass fail now
        self._tick()
        if commit:
            for layer, tensor in enumerate(state.tensors.values()):
                tensor[slot] = fresh + layer
        self._velocity.copy_(latents_BCFHW * 0.3 + total.sum().sin())  # one buffer, overwritten by the next call
        return self._velocity

    def decode(self, latent_BCFHW: Tensor, state: State, frames: int) -> Tensor:
        """Frames of flat colour; each depends on all latents before it."""
        assert latent_BCFHW.shape == (1, 16, 1, 8, 8)
        self.on_decode()
        memory = state.tensors["memory"]
        mean = latent_BCFHW.mean(dim=(0, 2, 3, 4))[:3]
        memory.copy_(0.5 * memory + mean if frames > 1 else mean)
        return memory.tanh().view(1, 3, 1, 1, 1).expand(1, 3, frames, 128, 128)

    def peak_bytes(self) -> int:
        return 123_000_000


class EncoderState(State):
    """An encoder that a test made."""

    def __init__(self, encoder: Any) -> None:
        super().__init__({})
        self.encoder = encoder


def toy_tokenize(texts: list[str], length: int) -> Tensor:
    """One token a character."""
    rows = torch.zeros(len(texts), length, dtype=torch.int32)
    for row, text in zip(rows, texts):
        codes = [ord(letter) % 97 + 1 for letter in text][:length]
        row[: len(codes)] = torch.tensor(codes, dtype=torch.int32)
    return rows
