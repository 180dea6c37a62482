"""A DiT's pass over one chunk as a function of tensors alone, K and V of earlier chunks among them, plain or from CUDA graphs.

Legend: B stories, F latent frames of a chunk, L tokens of a chunk, H heads, D head_dim, E text length, C, h, w latent sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.kv_cache_write.reference import quantize_kv
from longtake.plugins.sink_attention.reference import attention_fp8, dequantize_kv
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.objective.graphed import GraphedLoss, GraphedPass


def round_trip_kv(kv: Tensor) -> Tensor:
    """K and V [B, 2, L, H, D] as the NVFP4 cache gives them back, fp32: an amax for K and one for V of every story."""
    flat = kv.float().flatten(0, 1)
    values, scales, amax = quantize_kv(flat)
    return dequantize_kv(*(part.unflatten(0, kv.shape[:2]) for part in (values, scales, amax)))


class ChunkPass:
    """The passes that a rollout makes, each of: latents [B, C, F, h, w], sinusoid [B, F, freq_dim], cos and sin
    [B, L, D/2], each layer's context [B, 1, 2, E, H, D], and each layer's K and V of the chunks it sees, one after the
    other, [B, 2, L, H, D]."""

    def __init__(self, dit: CausalDiT, fmt: str, dtype: torch.dtype, attention: str = "bf16") -> None:
        """`fmt` "nvfp4" keeps K and V as the 4-bit cache would give them back, in `dtype`. `attention`: "fp8" as our
        Hopper kernel computes it, else in the passes' own dtype."""
        self.dit, self.fmt, self.dtype = dit, fmt, dtype
        self.attention: Callable[..., Tensor] = (
            attention_fp8 if attention == "fp8" else functional.scaled_dot_product_attention
        )

    def look(self, *tensors: Tensor) -> Tensor:
        """Velocity, fp32 [B, C, F, h, w], without gradient."""
        with torch.no_grad():
            return self.velocity(*tensors)[0]

    def learn(self, chunk: int, *tensors: Tensor) -> Tensor:
        """The same with a gradient in the weights and the context; chunk `chunk` is asked for once a backward pass."""
        return self.velocity(*tensors)[0]

    def write(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each layer's K and V of this chunk as kept, [B, 2, L, H, D], without gradient."""
        with torch.no_grad():
            return self.kept(*tensors)

    def velocity(self, *tensors: Tensor) -> tuple[Tensor]:
        """Velocity, fp32 [B, C, F, h, w]."""
        return (self.run(tensors, None),)

    def kept(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each layer's K and V as kept, [B, 2, L, H, D]."""
        found: list[Tensor] = []
        self.run(tensors, found)
        return tuple(found)

    def run(self, tensors: tuple[Tensor, ...], kept: list[Tensor] | None) -> Tensor:
        """Velocity, fp32 [B, C, F, h, w]; each layer's K and V as kept are added to `kept`."""
        sample, sinusoid, cos, sin, *rest = tensors
        layers = len(self.dit.blocks)
        context, past = rest[:layers], rest[layers:]
        seen = len(past) // layers

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if kept is not None:
                fresh = torch.stack((k, v), 1)
                kept.append((round_trip_kv(fresh) if self.fmt == "nvfp4" else fresh).to(self.dtype))
            earlier = past[layer * seen : (layer + 1) * seen]
            keys, values = (
                torch.cat((*(x[:, i].to(q.dtype) for x in earlier), own.to(q.dtype)), 1) for i, own in enumerate((k, v))
            )
            queries, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
            return self.attention(queries, keys, values).transpose(1, 2).to(q.dtype)

        return self.dit(sample, sinusoid, (cos, sin), context, attend).float()


class GraphedChunkPass(ChunkPass):
    """The same, each pass captured for every number of chunks that it sees, those with a gradient for every chunk: a small
    model's pass is launches, not arithmetic. The tensors of `dit` may change in place only."""

    def __init__(
        self,
        dit: CausalDiT,
        fmt: str,
        dtype: torch.dtype,
        autocast: Callable[[], AbstractContextManager[None]],
        attention: str = "bf16",
    ) -> None:
        super().__init__(dit, fmt, dtype, attention)
        plain = ChunkPass(dit, fmt, dtype, attention)  # not this one, which would then hold itself, and its graphs
        self._velocity, kept = under(autocast, plain.velocity), under(autocast, plain.kept)
        self.looks, self.writes = GraphedPass(self._velocity), GraphedPass(kept)
        self.learns: dict[int, GraphedLoss] = {}  # by chunk: a graph holds what the backward pass needs of one run

    def look(self, *tensors: Tensor) -> Tensor:
        """See ChunkPass."""
        return self.looks(*tensors)[0]

    def learn(self, chunk: int, *tensors: Tensor) -> Tensor:
        """See ChunkPass."""
        if chunk not in self.learns:
            self.learns[chunk] = GraphedLoss({"dit": self.dit}, self._velocity, enabled=True)
        with torch.autocast("cuda", enabled=False):  # a backward pass is captured, too
            return self.learns[chunk](*tensors)[0]

    def write(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See ChunkPass."""
        return self.writes(*tensors)


def under(
    autocast: Callable[[], AbstractContextManager[None]], function: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    """`function` under autocast, which is then captured with it."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        with autocast():
            return function(*tensors)

    return run
