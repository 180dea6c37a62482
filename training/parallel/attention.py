"""Attention between blocks of a sequence, block by block, exactly the blocks that are seen and no mask.

Nothing but q, k, v, the output and its log-sum-exp is kept for the backward pass, which gathers a block's keys again:
memory grows with the sequence, not with its square.

Legend: B batch, L = S * T tokens in S blocks of T, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.training.parallel.kernels import Kernel, kernel_for

Seen = tuple[tuple[int, ...], ...]


def attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Sequence[Seen]) -> Tensor:
    """Attention [B, L, H, D] of each block of q over those blocks of k and v that `seen` lists for it.

    Args:
        q, k, v: [B, L, H, D], one dtype.
        seen: one table for all samples, or one a sample; seen[b][position] lists positions. An empty list: output 0.
    """
    if len(set(seen)) == 1:
        return _attend(q, k, v, seen[0])
    rows = [_attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], table) for i, table in enumerate(seen)]
    return torch.cat(rows)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    out: Tensor = SeenAttention.apply(q, k, v, seen, kernel_for(q))  # type: ignore[no-untyped-call]
    return out


class SeenAttention(torch.autograd.Function):
    """See `attend_seen`, for one table."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Seen, kernel: Kernel) -> Tensor:
        tokens = q.shape[1] // len(seen)
        out = torch.zeros_like(q)
        kept: list[Any] = []
        for position, keys in enumerate(seen):
            if keys:
                own, *saved = kernel.forward(
                    block(q, position, tokens), gather(k, keys, tokens), gather(v, keys, tokens)
                )
                block(out, position, tokens).copy_(own)
                kept.append(saved)
            else:
                kept.append(())
        ctx.seen, ctx.kernel, ctx.tokens = seen, kernel, tokens
        ctx.sizes = [len(saved) for saved in kept]
        # A kernel also keeps lengths, and None where it has no such tensor: they are remembered as they are
        flat = [value for saved in kept for value in saved]
        ctx.plain = [(isinstance(value, Tensor), None if isinstance(value, Tensor) else value) for value in flat]
        ctx.save_for_backward(q, k, v, out, *(value for value in flat if isinstance(value, Tensor)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, *tensors = ctx.saved_tensors
        rest = iter(tensors)
        flat = iter([next(rest) if is_tensor else value for is_tensor, value in ctx.plain])
        grad, tokens = grads[0], ctx.tokens
        # A key is seen by up to 2N blocks: their gradients are added up in fp32
        dq, dk, dv = torch.zeros_like(q), *(torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for position, (keys, size) in enumerate(zip(ctx.seen, ctx.sizes)):
            saved = [next(flat) for _ in range(size)]
            if not keys:
                continue
            pieces = ctx.kernel.backward(
                block(grad, position, tokens), block(q, position, tokens), gather(k, keys, tokens),
                gather(v, keys, tokens), block(out, position, tokens), *saved,
            )  # fmt: skip
            block(dq, position, tokens).copy_(pieces[0])
            for total, piece in ((dk, pieces[1]), (dv, pieces[2])):
                for i, key in enumerate(keys):
                    block(total, key, tokens).add_(piece[:, :, i * tokens : (i + 1) * tokens])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def block(x: Tensor, position: int, tokens: int) -> Tensor:
    """View of one block of x [B, L, H, D], [B, H, T, D]."""
    return cut(x, position * tokens, (position + 1) * tokens).transpose(1, 2)


def cut(x: Tensor, start: int, stop: int) -> Tensor:
    """x[:, start:stop]. A single sample's stride is that of a tensor of this size: cuDNN plans anew for other strides."""
    return x[0, start:stop][None] if len(x) == 1 else x[:, start:stop]


def gather(x: Tensor, positions: Sequence[int], tokens: int) -> Tensor:
    """Blocks of x [B, L, H, D] one after the other, [B, H, n T, D]; a view where they stand so."""
    first, count = positions[0], len(positions)
    if list(positions) == list(range(first, first + count)):
        return cut(x, first * tokens, (first + count) * tokens).transpose(1, 2)
    return torch.cat([x[:, p * tokens : (p + 1) * tokens] for p in positions], 1).transpose(1, 2)
