"""Ulysses: an all-to-all turns "my tokens, all heads" into "all tokens, my heads", and another one back.

Legend: B batch, L tokens of a rank, P ranks, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tokens(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, L, H, D] of this rank to [B, P L, H / P, D], the ranks' tokens in the order of ranks. Differentiable."""
    if group is None:
        return x
    out: Tensor = _GatherTokens.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def gather_heads(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Inverse of `gather_tokens`. Differentiable."""
    if group is None:
        return x
    out: Tensor = _GatherHeads.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def tokens_from_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    sent = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
    return exchanged(sent, group).transpose(0, 1).flatten(1, 2)


def heads_from_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    sent = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    return exchanged(sent, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def exchanged(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row i of `sent` [P, ...] goes to rank i; row i of the result came from rank i."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tokens_from_heads(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return heads_from_tokens(grads[0], ctx.group), None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return heads_from_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return tokens_from_heads(grads[0], ctx.group), None
