"""The DiT's blocks as ops of ours between the linears: what a recipe exports whose linears a library runs.

The same arithmetic as `dit.Block`, cut where memory is read and written once: a norm takes the residual before it and
the modulation behind it along, so blocks overlap, the end of one being the beginning of the next.
Legend: T tokens, F latent frames, H heads, D head_dim, E text length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.block_norm.reference import BLOCK_NORM_EPS
from longtake.plugins.pointwise import QK_NORM_EPS, gated_add
from longtake.training.models.wan.dit import Attend, Attention, Block, CausalDiT, Rope

NormRope = Callable[[Attention, Tensor, Tensor, Rope], tuple[Tensor, Tensor]]


def fused_blocks(
    dit: CausalDiT, x: Tensor, e0: Tensor, rope: Rope, context: list[Tensor], attend: Attend, norm_rope: NormRope
) -> Tensor:
    """x [T, dim], e0 [F, 6, dim], context one [2, E, H, D] a layer; tokens after the last block, [T, dim].

    Raises:
        LongtakeError: the ops have another eps than the model.
    """
    if dit.config.eps not in (BLOCK_NORM_EPS, QK_NORM_EPS):
        raise LongtakeError("the ops of the blocks have another eps", got=dit.config.eps, expected=BLOCK_NORM_EPS)
    ops = torch.ops.longtake
    blocks: list[Block] = list(dit.blocks)  # type: ignore[arg-type]
    n = ops.norm_modulate(x, e0, blocks[0].modulation)
    for layer, block in enumerate(blocks):
        own, other = block.self_attn, block.cross_attn
        q, k = norm_rope(own, own.q(n), own.k(n), rope)
        y = own.o(attend(layer, q, k, own.split(own.v(n))).flatten(-2))
        x, n = ops.gated_norm_affine(x, y, e0, block.modulation, block.norm3.weight, block.norm3.bias)
        q = other.split(ops.rms_norm(other.q(n), other.norm_q.weight))
        y = other.o(ops.cross_attention(q, context[layer].to(q.dtype)).flatten(-2))
        x, n = ops.residual_norm_modulate(x, y, e0, block.modulation)
        y = block.ffn(n)
        if layer + 1 < len(blocks):
            x, n = ops.gated_norm_modulate(x, y, e0, block.modulation, blocks[layer + 1].modulation)
    last = blocks[-1].modulation[0, 5].float() + e0[:, 5].float()
    return gated_add(x, y, last)
