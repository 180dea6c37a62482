"""Plain PyTorch as a backend, so that the same session drives it and the engines.

Legend: S slots, T tokens of a chunk, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.base import Cache, Encoder
from longtake.runtime.bench.torch_dit import PlainDiT
from longtake.runtime.bench.torch_vae import PlainDecoder
from longtake.training.models.wan.vae import CausalVAE


class PlainTorchBackend:
    """Implements Backend. The cache of a layer is (K, V), each [S, T, H, D] in the weights' dtype."""

    def __init__(
        self, recipe: Recipe, name: str, dit: PlainDiT | None, vae: CausalVAE | None, device: torch.device
    ) -> None:
        self.recipe, self.preset, self.device = recipe, recipe.model, device
        self.name, self.reason = name, f"PyTorch {torch.__version__}"
        self._dit, self._vae = dit, vae
        self._table: tuple[Tensor | None, tuple[int, int]] = (None, (0, 0))

    def text(self, tokens: Tensor) -> Tensor:
        """Not part of a benchmark."""
        raise LongtakeError("plain PyTorch has no text encoder here")

    @torch.no_grad()
    def context(self, embeddings: Tensor) -> list[Tensor]:
        """See Backend.context."""
        return self._module.dit.context(embeddings[0])

    @property
    def _module(self) -> PlainDiT:
        if self._dit is None:
            raise LongtakeError("this side was opened without the DiT", fix="--networks dit")
        return self._dit

    def new_cache(self) -> Cache:
        """See Backend.new_cache."""
        config, preset = self.preset.dit, self.preset
        shape = (preset.window_chunks, preset.chunk_tokens, config.heads, config.head_dim)
        dtype = self._module.dit.dtype
        return [tuple(torch.zeros(shape, dtype=dtype, device=self.device) for _ in "kv") for _ in range(config.layers)]

    @torch.no_grad()
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
        """See Backend.dit. Every pass writes its K and V into the slot that no entry of the table names.

        That slot is the one the clean pass is to fill, so slots stay contiguous and nothing is gathered or copied.
        """
        slots, own = self._slots(table)
        return self._module(latents_BCFHW[0], sinusoid, rope_cos, rope_sin, context, cache, slots, own)[None]

    def _slots(self, table: Tensor) -> tuple[int, int]:
        """(slots attended to, the one this chunk writes); read from the device once a chunk, not once a pass."""
        if self._table[0] is not table:
            read = [slot for slot in table.tolist() if slot >= 0]
            self._table = table, (len(read) + 1, min(set(range(self.preset.window_chunks)) - set(read)))
        return self._table[1]

    def new_decoder(self) -> PlainDecoder:
        """See Backend.new_decoder."""
        if self._vae is None:
            raise LongtakeError("this side was opened without the VAE", fix="--networks vae")
        return PlainDecoder(self._vae)

    def new_encoder(self) -> Encoder:
        """Not part of a benchmark."""
        raise LongtakeError("plain PyTorch has no VAE encoder here")

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes: what torch's allocator reserved at most."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0

    def close(self) -> None:
        """See Backend.close."""
        self._dit = self._vae = None
