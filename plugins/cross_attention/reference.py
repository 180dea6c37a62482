"""Attention over a prompt's keys and values: the plain PyTorch truth. Exports to ONNX as it stands.

It is what the DiT computes in training. Legend: L tokens, H heads, D head_dim, E text length.
"""

from __future__ import annotations

import math

from torch import Tensor


def cross_attention(q: Tensor, context: Tensor) -> Tensor:
    """q [L,H,D], context [2,E,H,D] (K, then V) to [L,H,D]; softmax in fp32."""
    return dense_cross_attention(q, context).contiguous()


def dense_cross_attention(q: Tensor, context: Tensor) -> Tensor:
    """q [T, H, D] over one prompt's `context` [2, E, H, D]; softmax in fp32. Plain ops, so that it exports."""
    k, v = context[0].to(q.dtype).permute(1, 2, 0), context[1].to(q.dtype).transpose(0, 1)
    scores = (q.transpose(0, 1) @ k).float() * (1.0 / math.sqrt(q.shape[-1]))
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(0, 1)
