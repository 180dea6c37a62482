"""A backend with a stopwatch: the session runs unchanged, every pass and every decoded latent is timed by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.runtime.backends.base import Backend, Cache, Decoder, decode_device_of
from longtake.runtime.bench.timing import Marks
from longtake.training.models.random_weights import seed_of


class TimedBackend:
    """Implements Backend around another one; marks: "denoise_pass", "clean_pass", "context", and of decoders "latent".

    text: the prompt's embeddings are random, so that no text encoder is needed.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.marks, self.decode_marks = Marks(inner.device), Marks(decode_device_of(inner))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def text(self, tokens: Tensor) -> Tensor:
        """Random embeddings, fp32 [1, E, text_dim], the same for every prompt."""
        config = self.inner.preset.text
        generator = torch.Generator().manual_seed(seed_of("embeddings"))
        return torch.randn(1, config.length, config.dim, generator=generator).to(self.inner.device)

    def context(self, embeddings: Tensor) -> list[Tensor]:
        """See Backend.context."""
        with self.marks.span("context"):
            return self.inner.context(embeddings)

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
        with self.marks.span("clean_pass" if int(write_slot) >= 0 else "denoise_pass"):
            return self.inner.dit(latents_BCFHW, sinusoid, rope_cos, rope_sin, context, cache, table, write_slot)

    def new_decoder(self) -> TimedDecoder:
        """See Backend.new_decoder."""
        return TimedDecoder(self.inner.new_decoder(), self.decode_marks)


class TimedDecoder:
    """Implements Decoder around another one."""

    def __init__(self, inner: Decoder, marks: Marks) -> None:
        self.inner, self.marks = inner, marks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """See Decoder.decode."""
        with self.marks.span("latent"):
            return self.inner.decode(latent_BCHW)
