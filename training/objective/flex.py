"""Teacher forcing's self-attention as one FlexAttention call, for GPUs and long sequences.

Nothing is copied or gathered and only blocks that are seen are computed: memory grows with the sequence, not with its
square as that of `teacher_forcing.block_attention`, which copies each block's past.

A sequence is blocks of equal size in some order of *places*: place b is clean block b, place N + b noisy block b. That
table decodes a token's index, so the same rule serves [clean ; noisy] on one rank and any order of blocks that ranks
put together.

Legend: B batch, N chunks, S blocks of the sequence, T tokens of a block, H heads, D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from longtake.errors import LongtakeError
from longtake.training.models.wan.dit import Attend
from longtake.training.models.wan.window import block_mask

logger = logging.getLogger(__name__)

TILE = 128  # tokens that the kernel decides about together
TILES = 1 << 22  # a finer mask than this costs more memory than it is worth
LONG = 8192  # tokens from which on FlexAttention is chosen; block by block is captured in CUDA graphs, and tested most


def natural_order(chunks: int) -> tuple[int, ...]:
    """[clean ; noisy] without the last clean block, which nothing looks at."""
    return tuple(place for place in range(2 * chunks) if place != chunks - 1)


def seen_places(history: Tensor, order: Sequence[int]) -> Tensor:
    """Which blocks each block of the sequence sees, bool [..., S, S], of a history bool [..., N, N] (see `window`)."""
    places = torch.tensor(list(order), device=history.device)
    return block_mask(history).index_select(-2, places).index_select(-1, places)


def tiled_mask(seen: Tensor, block_tokens: int, tile: int | None = None) -> BlockMask:
    """The kernel's mask of what `seen_places` gives, [S, S] or [B, S, S]: every tile is seen whole or not at all.

    tile: tokens of a tile, a multiple of 128 that divides block_tokens. None: 128, or a whole block where the mask
    would be large.

    Raises:
        LongtakeError: blocks don't divide into tiles.
    """
    tile = tile or _tile(seen.shape[-1], block_tokens)
    if block_tokens % tile or tile % TILE:
        what, got = "blocks don't divide into tiles of FlexAttention", f"{block_tokens} tokens a block, tiles of {tile}"
        raise LongtakeError(what, got=got, expected=f"multiples of {TILE}", fix="--attention blocks")
    pieces = block_tokens // tile
    whole = (seen if seen.dim() == 3 else seen[None])[:, None]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return whole[b if len(whole) > 1 else 0, 0, q // block_tokens, k // block_tokens]

    tiles = whole.repeat_interleave(pieces, -1).repeat_interleave(pieces, -2)
    count = tiles.sum(-1, dtype=torch.int32)
    index = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    none, nowhere = torch.zeros_like(count), torch.zeros_like(index)
    return BlockMask.from_kv_blocks(none, nowhere, count, index, BLOCK_SIZE=tile, mask_mod=visible)


def flex_attention_for(history: Tensor, chunks: int, block_tokens: int, order: Sequence[int] | None = None) -> Attend:
    """Self-attention `attend(layer, q, k, v)`, all [B, S T, H, D], of a sequence of blocks.

    Args:
        history: which clean blocks each block sees, bool [N, N] or [B, N, N].
        order: the place of each block of the sequence; `natural_order` if None.

    The heads may be a part of the model's: sequence parallelism gathers the sequence and scatters the heads.
    """
    mask = tiled_mask(seen_places(history, order or natural_order(chunks)), block_tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kind = q.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
        out: Tensor = kernel(kind)(q, k, v, block_mask=mask)
        return out.transpose(1, 2)

    return attend


def _tile(blocks: int, block_tokens: int) -> int:
    return TILE if (blocks * block_tokens // TILE) ** 2 <= TILES or block_tokens % TILE else block_tokens


def kernel(kind: str) -> Callable[..., Any]:
    """FlexAttention on a kind of device: compiled on a GPU, as plain operations on the CPU."""
    return compiled() if kind == "cuda" else cast(Callable[..., Any], flex_attention)


@cache
def compiled() -> Callable[..., Any]:
    """FlexAttention as a kernel, compiled anew for each length of the sequence."""
    return torch.compile(flex_attention, dynamic=False)


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the compiled kernel works on a GPU, forwards and backwards; if not, the log says why."""
    try:
        q = torch.ones(1, 1, 2 * TILE, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        mask = tiled_mask(torch.eye(2, dtype=torch.bool, device=device), TILE)
        out = compiled()(q, q.detach(), q.detach(), block_mask=mask)
        out.sum().backward()
        return bool((out == 1).all())
    except Exception as error:  # noqa: BLE001  (Triton, a C compiler or the driver: whatever is missing)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("FlexAttention doesn't run here, so attention is block by block: %s", reason[0])
        return False


def chosen(asked: str, device: torch.device, chunks: int, block_tokens: int) -> bool:
    """Whether FlexAttention computes a teacher-forced clip, of "auto", "flex" or "blocks".

    "auto" takes it on a GPU for sequences of `LONG` tokens or more.

    Raises:
        LongtakeError: "flex" was asked for and can't be had.
    """
    fits = block_tokens % TILE == 0
    if asked == "auto":
        long = (2 * chunks - 1) * block_tokens >= LONG
        return long and fits and device.type == "cuda" and runs_on(device)
    if asked == "flex" and not (fits and device.type == "cuda" and runs_on(device)):
        got = f"device {device}, {block_tokens} tokens a chunk"
        expected = f"a GPU with Triton, and a multiple of {TILE} tokens a chunk"
        raise LongtakeError("FlexAttention can't train this here", got=got, expected=expected, fix="--attention auto")
    return asked == "flex"
