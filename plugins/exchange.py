"""Exchanges among the ranks that share a chunk, as nodes of a graph: where it is cut, a communicator runs them.

No runtime has them, and they have no body on purpose: a graph with such a node runs on its ranks or not at all.
Legend: L tokens of a rank, H heads, D head_dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DOMAIN = "longtake.ranks"  # of the ONNX nodes
GATHER_TOKENS, GATHER_HEADS = "gather_tokens", "gather_heads"
_TORCH = "longtake_ranks"


def exchanged_shape(name: str, shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The shape [L, H, D] of a rank's tokens to [P L, H / P, D] of its heads (`GATHER_TOKENS`), or back."""
    tokens, heads, dim = shape
    if name == GATHER_TOKENS:
        return tokens * ranks, heads // ranks, dim
    return tokens // ranks, heads * ranks, dim


def _define(name: str, tensors: Sequence[str]) -> None:
    given, made = ", ".join(f"Tensor {each}" for each in tensors), ", ".join("Tensor" for _ in tensors)
    torch.library.define(f"{_TORCH}::{name}", f"({given}, int ranks) -> {made if len(tensors) == 1 else f'({made})'}")

    def shapes_only(*inputs: Tensor | int) -> Tensor | tuple[Tensor, ...]:
        *xs, ranks = inputs
        out = tuple(x.new_empty(exchanged_shape(name, x.shape, int(ranks))) for x in xs if isinstance(x, Tensor))
        return out if len(out) > 1 else out[0]

    torch.library.register_fake(f"{_TORCH}::{name}", shapes_only)


if not hasattr(torch.ops.longtake_ranks, GATHER_HEADS):  # a module reload must not define them twice
    _define(GATHER_TOKENS, ("q", "k", "v"))
    _define(GATHER_HEADS, ("out",))


def gather_tokens(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each [L, H, D] of this rank's tokens to [P L, H / P, D] of its heads. A node of an export; nothing computes it here."""
    return torch.ops.longtake_ranks.gather_tokens(q, k, v, ranks)  # type: ignore[no-any-return]


def gather_heads(out: Tensor, ranks: int) -> Tensor:
    """The way back."""
    return torch.ops.longtake_ranks.gather_heads(out, ranks)  # type: ignore[no-any-return]
