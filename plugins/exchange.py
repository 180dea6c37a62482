"""Exchanges among the ranks that share a stream, as nodes of a graph: where it is cut, a communicator runs them.

No runtime has them, and they have no body on purpose: a graph with such a node runs on its ranks or not at all.
Legend: L tokens of a rank, H heads, D head_dim, P ranks; T frames, Y rows, X columns, C channels of a video stream, G ghost
rows: on either side of a rank's own, what its neighbours have there, and zeros beyond the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DOMAIN = "longtake.ranks"  # of the ONNX nodes
GATHER_TOKENS, GATHER_HEADS, TAKE_ROWS, HALO = "gather_tokens", "gather_heads", "take_rows", "halo"
TENSORS = {GATHER_TOKENS: ("q", "k", "v"), GATHER_HEADS: ("out",), TAKE_ROWS: ("x",), HALO: ("x",)}
# One each: torch's exporter matches several by the order of the ONNX schema's attributes, which have none.
NUMBERS = {GATHER_TOKENS: ("ranks",), GATHER_HEADS: ("ranks",), TAKE_ROWS: ("ranks",), HALO: ("ghost",)}
FIRST_GHOST = 1  # ghost rows on either side where whole frames are cut
_TORCH = "longtake_ranks"


def exchanged_shape(name: str, shape: Sequence[int], ranks: int = 1, ghost: int = FIRST_GHOST) -> tuple[int, ...]:
    """[L, H, D] of a rank's tokens to [P L, H / P, D] of its heads (`GATHER_TOKENS`), or back (`GATHER_HEADS`); [T, Y, X, C] of
    whole frames to [T, Y / P + 2 G, X, C] (`TAKE_ROWS`), which `HALO` leaves as it is."""
    if name == HALO:
        return tuple(shape)
    if name == TAKE_ROWS:
        return shape[0], shape[1] // ranks + 2 * ghost, *shape[2:]
    tokens, heads, dim = shape
    if name == GATHER_TOKENS:
        return tokens * ranks, heads // ranks, dim
    return tokens // ranks, heads * ranks, dim


def _define(name: str) -> None:
    tensors, numbers = TENSORS[name], NUMBERS[name]
    given = ", ".join([*(f"Tensor {each}" for each in tensors), *(f"int {each}" for each in numbers)])
    made = ", ".join("Tensor" for _ in tensors)
    torch.library.define(f"{_TORCH}::{name}", f"({given}) -> {made if len(tensors) == 1 else f'({made})'}")

    def shapes_only(*inputs: Tensor | int) -> Tensor | tuple[Tensor, ...]:
        counts = dict(zip(numbers, (int(x) for x in inputs if not isinstance(x, Tensor)), strict=True))
        out = tuple(x.new_empty(exchanged_shape(name, x.shape, **counts)) for x in inputs if isinstance(x, Tensor))
        return out if len(out) > 1 else out[0]

    torch.library.register_fake(f"{_TORCH}::{name}", shapes_only)


if not hasattr(torch.ops.longtake_ranks, HALO):  # a module reload must not define them twice
    for _name in TENSORS:
        _define(_name)


def gather_tokens(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each [L, H, D] of this rank's tokens to [P L, H / P, D] of its heads. A node of an export; nothing computes it here."""
    return torch.ops.longtake_ranks.gather_tokens(q, k, v, ranks)  # type: ignore[no-any-return]


def gather_heads(out: Tensor, ranks: int) -> Tensor:
    """The way back."""
    return torch.ops.longtake_ranks.gather_heads(out, ranks)  # type: ignore[no-any-return]


def take_rows(x: Tensor, ranks: int) -> Tensor:
    """A rank's rows of whole frames [T, Y, X, C], with `FIRST_GHOST` ghost rows: [T, Y / P + 2 G, X, C]."""
    return torch.ops.longtake_ranks.take_rows(x, ranks)  # type: ignore[no-any-return]


def halo(x: Tensor, ghost: int) -> Tensor:
    """x [T, Y / P + 2 G, X, C] with its ghost rows as the neighbours have them; where it is run, in place."""
    return torch.ops.longtake_ranks.halo(x, ghost)  # type: ignore[no-any-return]
