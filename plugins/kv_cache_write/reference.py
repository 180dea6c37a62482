"""Write one block's K and V into a slot of the cache: the plain PyTorch truth. Exports to ONNX as it stands.

Functional: new tensors come out, and a `write_slot` of -1 changes nothing. Legend: S slots, L tokens, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.plugins.nvfp4.formats import encode_e2m1, encode_e4m3
from longtake.plugins.nvfp4.layout import int8_from_bytes, pack_nibbles
from longtake.plugins.nvfp4.reference import BLOCK, scale_blocks

RULE, ORDER = "mse", "longlive"


def kv_cache_write_nvfp4(
    k: Tensor, v: Tensor, values: Tensor, scales: Tensor, amax: Tensor, write_slot: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [L,H,D]; values int8 [S,2,L,H,D/2]; scales int8 [S,2,L,H,D/16]; amax fp32 [S,2]; write_slot int32 [1].

    Blocks of 16 along D, one amax for K and one for V; rule mse, order longlive; the low nibble is the even index.
    """
    new_values, new_scales, new_amax = quantize_kv(torch.stack((k, v)).to(torch.float32))
    return (
        replace_slot(values, new_values, write_slot),
        replace_slot(scales, new_scales, write_slot),
        replace_slot(amax, new_amax, write_slot),
    )


def replace_slot(cache: Tensor, new: Tensor, write_slot: Tensor) -> Tensor:
    """[S,...] with `new` [...] at `write_slot` [1]; none is replaced if that is -1. Copies bytes, of any dtype."""
    slots = torch.arange(cache.shape[0], dtype=torch.int32, device=cache.device)
    source = torch.where(slots == write_slot, cache.shape[0], slots)
    return torch.cat((cache, new.unsqueeze(0))).index_select(0, source)


def quantize_kv(kv: Tensor, over_all: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [2,L,H,D] to (values int8 [2,L,H,D/2], scales int8 [2,L,H,D/16], amax fp32 [2]).

    over_all: makes the amax of all heads of that of these, where a rank has some of them.
    """
    amax = kv.abs().amax(dim=(1, 2, 3))
    amax = amax if over_all is None else over_all(amax)
    scaled, scale = scale_blocks(kv.unflatten(-1, (-1, BLOCK)), amax.view(-1, 1, 1, 1), RULE, ORDER)
    packed = pack_nibbles(encode_e2m1(scaled).flatten(-2))
    return int8_from_bytes(packed), encode_e4m3(scale).to(torch.int8), amax


def kv_cache_write_bf16(k: Tensor, v: Tensor, cache: Tensor, write_slot: Tensor) -> Tensor:
    """k, v [L,H,D]; cache [S,2,L,H,D] in the compute dtype; write_slot int32 [1]."""
    return replace_slot(cache, torch.stack((k, v)).to(cache.dtype), write_slot)
