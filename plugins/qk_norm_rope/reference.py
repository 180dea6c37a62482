"""RMSNorm and RoPE of one block's queries and keys: the plain PyTorch truth. Exports to ONNX as it stands.

It is what the DiT computes in training, so the two cannot differ. Legend: L tokens, H heads, D head_dim.
"""

from __future__ import annotations

from torch import Tensor

from longtake.plugins.pointwise import QK_NORM_EPS, apply_rope, rms_norm


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope_cos: Tensor, rope_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k [L,H,D] as projected; weights [H*D]; rope_cos, rope_sin fp32 [L,D/2]. Returns both [L,H,D], in q's dtype.

    Each token is normalised over all its H*D elements, rounded, weighted, rounded, rotated and rounded again.
    """

    def one(x: Tensor, weight: Tensor) -> Tensor:
        normal = rms_norm(x.flatten(-2), weight, QK_NORM_EPS).unflatten(-1, x.shape[-2:])
        return apply_rope(normal, rope_cos, rope_sin)

    return one(q, q_weight), one(k, k_weight)
