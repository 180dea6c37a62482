"""Attention over a prompt's keys and values: the plain PyTorch truth. Exports to ONNX as it stands.

It is what the DiT computes in training. Legend: L tokens, H heads, D head_dim, E text length.
"""

from __future__ import annotations

from torch import Tensor

from longtake.training.dit import dense_cross_attention


def cross_attention(q: Tensor, context: Tensor) -> Tensor:
    """q [L,H,D], context [2,E,H,D] (K, then V) to [L,H,D]; softmax in fp32."""
    return dense_cross_attention(q, context).contiguous()
