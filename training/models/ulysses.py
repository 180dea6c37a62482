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
    sent = x.unflatten(2, (dist.get_world_size(group), -1)).permute(2, 0, 1, 3, 4)
    return exchanged(sent, group).transpose(0, 1).flatten(1, 2)


def gather_heads(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Inverse of `gather_tokens`. Differentiable."""
    if group is None:
        return x
    sent = x.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1)
    return exchanged(sent, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def exchanged(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row i of `sent` [P, ...] goes to rank i; row i of the result came from rank i."""
    received: Tensor = _Exchange.apply(sent, group)  # type: ignore[no-untyped-call]
    return received


class _Exchange(torch.autograd.Function):
    """Gradients go back the way their tensors came, which is the same exchange."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, sent = group, sent.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.forward(ctx, grads[0], ctx.group), None
