"""Our DiT as plain PyTorch does it best: the same module and weights in bf16, fused norms, K/V written where they are
read, cuDNN attention. It is what the engines are compared with, so nothing in it may be slow on purpose.

Two pieces a layer, before and after self-attention, so that torch.compile sees one graph for all layers; attention and
matrix products are the library's either way. Legend: T tokens, H heads, D head_dim, S slots, F latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtake.training.models.wan.dit import Block, CausalDiT

ATTENTIONS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
Rope = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def best_attention(name: str = "cudnn") -> Iterator[None]:
    """Inside, scaled_dot_product_attention prefers the named library; the others remain as fallback."""
    with sdpa_kernel(ATTENTIONS[name], set_priority=True):
        yield


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [T, H, D] over k, v [N, H, D], to [T, H * D]."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    return functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(-2)


def complex_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate pairs of x [T, H, D] by complex fp32 phases [T, 1, D/2]: the fewest kernels without a compiler."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(cos_sin)).flatten(-2).to(x.dtype)


def real_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """The same without complex numbers, which the compiler can't fuse."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_sin.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def modulated(x: Tensor, eps: float, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift, x [T, dim], scale and shift [F, dim]."""
    normal = functional.layer_norm(x, x.shape[-1:], eps=eps).unflatten(0, (scale.shape[0], -1))
    return torch.addcmul(shift[:, None], normal, 1 + scale[:, None]).flatten(0, 1)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, x and y [T, dim], gate [F, dim]."""
    by_frame = [t.unflatten(0, (gate.shape[0], -1)) for t in (x, y)]
    return torch.addcmul(by_frame[0], by_frame[1], gate[:, None]).flatten(0, 1)


def before_attention(
    block: Block, x: Tensor, e0: Tensor, cos_sin: Tensor, rope: Rope, k_slot: Tensor, v_slot: Tensor
) -> Tensor:
    """Queries [T, H, D]; this chunk's keys and values go to k_slot, v_slot [T, H, D]."""
    own, m = block.self_attn, block.modulation[0] + e0
    y = modulated(x, block.eps, m[:, 1], m[:, 0])
    q, k = (
        functional.rms_norm(linear(y), y.shape[-1:], norm.weight, norm.eps).unflatten(-1, (own.heads, -1))
        for linear, norm in ((own.q, own.norm_q), (own.k, own.norm_k))
    )
    k_slot.copy_(rope(k, cos_sin))
    v_slot.copy_(own.v(y).unflatten(-1, (own.heads, -1)))
    return rope(q, cos_sin)


def after_attention(block: Block, x: Tensor, attended: Tensor, e0: Tensor, context: Tensor) -> Tensor:
    """The rest of the block: gate, cross-attention over context [2, E, H, D], FFN."""
    m, cross = block.modulation[0] + e0, block.cross_attn
    x = gated(x, block.self_attn.o(attended), m[:, 2])
    normal = functional.layer_norm(x, x.shape[-1:], block.norm3.weight, block.norm3.bias, block.eps)
    q = functional.rms_norm(cross.q(normal), x.shape[-1:], cross.norm_q.weight, cross.norm_q.eps)
    x = x + cross.o(attention(q.unflatten(-1, (cross.heads, -1)), context[0], context[1]))
    return gated(x, block.ffn(modulated(x, block.eps, m[:, 4], m[:, 3])), m[:, 5])


class PlainDiT:
    """The pass over one chunk. compile: keyword arguments of torch.compile, None for eager."""

    def __init__(self, dit: CausalDiT, compile: dict[str, Any] | None = None, library: str = "cudnn") -> None:
        self.dit, self.library = dit, library
        self.rope: Rope = complex_rope if compile is None else real_rope
        self.before: Callable[..., Tensor] = before_attention
        self.after: Callable[..., Tensor] = after_attention
        if compile is not None:
            torch._dynamo.config.recompile_limit = 64
            self.before = torch.compile(before_attention, dynamic=False, **compile)
            self.after = torch.compile(after_attention, dynamic=False, **compile)

    def __call__(
        self,
        latents: Tensor,
        sinusoid: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: list[Tensor],
        cache: Any,
        slots: int,
        own: int,
    ) -> Tensor:
        """Velocity fp32 [C, F, H, W] of latents fp32 [C, F, H, W].

        Args:
            sinusoid: [F, freq_dim]. cos, sin: fp32 [T, D/2]. context: a layer's [2, E, H, D] each.
            cache: a layer's (K, V), each [S, T, H, D]. slots: the first `slots` slots are attended to.
            own: the slot among them that takes this chunk's K and V.
        """
        dit = self.dit
        cos_sin = torch.stack((cos, sin), -1)[:, None]
        with best_attention(self.library):
            e, e0 = dit.time(sinusoid)
            embed = dit.patch_embedding
            x = functional.linear(dit.patchify(latents.to(dit.dtype)), embed.weight.flatten(1), embed.bias)
            for block, (k, v), text in zip(dit.blocks, cache, context, strict=True):
                q = self.before(block, x, e0, cos_sin, self.rope, k[own], v[own])
                attended = attention(q, k[:slots].flatten(0, 1), v[:slots].flatten(0, 1))
                x = self.after(block, x, attended, e0, text)
            m = dit.head.modulation[0] + e.unsqueeze(-2)
            patches = dit.head.head(modulated(x, dit.head.eps, m[:, 1], m[:, 0]))
        return dit.unpatchify(patches.float(), latents.shape[-3], *latents.shape[-2:])
