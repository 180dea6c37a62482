"""Attention over the cache slots that a table lists: the plain PyTorch truth. Exports to ONNX as it stands.

Only the listed slots are dequantized. No mask: queries see every key of every listed slot, in any order.
Legend: S slots, L tokens, H heads, D head_dim, W window length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.plugins.kv_cache_write.reference import ORDER, RULE
from longtake.plugins.nvfp4.formats import decode_e4m3, decode_nibbles
from longtake.plugins.nvfp4.layout import bytes_from_int8
from longtake.plugins.nvfp4.reference import BLOCK, dequantize_blocks


def sink_attention_nvfp4(
    q: Tensor, k: Tensor, v: Tensor, values: Tensor, scales: Tensor, amax: Tensor, table: Tensor
) -> Tensor:
    """q, k, v [L,H,D]; values int8 [S,2,L,H,D/2]; scales int8 [S,2,L,H,D/16]; amax fp32 [S,2]; table int32 [W].

    An entry -1 of the table is the current block, unquantized: k and v themselves. Returns [L,H,D] in q's dtype.
    """
    slots = table.clamp(min=0)
    cached = dequantize_kv(*(t.index_select(0, slots) for t in (values, scales, amax)))
    return _attend(q, k, v, cached, table)


def dequantize_kv(values: Tensor, scales: Tensor, amax: Tensor) -> Tensor:
    """int8 [W,2,L,H,D/2], int8 [W,2,L,H,D/16] and fp32 [W,2] to fp32 [W,2,L,H,D]."""
    elements = decode_nibbles(bytes_from_int8(values)).unflatten(-1, (-1, BLOCK))
    scale = decode_e4m3(bytes_from_int8(scales))
    return dequantize_blocks(elements, scale, amax[:, :, None, None, None], RULE, ORDER).flatten(-2)


def sink_attention_bf16(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor) -> Tensor:
    """q, k, v [L,H,D]; cache [S,2,L,H,D] in the compute dtype; table int32 [W], -1 is k, v. Returns [L,H,D]."""
    return _attend(q, k, v, cache.index_select(0, table.clamp(min=0)).to(torch.float32), table)


def _attend(q: Tensor, k: Tensor, v: Tensor, cached: Tensor, table: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in fp32 over cached fp32 [W,2,L,H,D], with the fresh block where the table says -1."""
    fresh = torch.stack((k, v)).to(torch.float32).unsqueeze(0)
    entries = torch.arange(table.shape[0], dtype=torch.int32, device=table.device)
    source = torch.where(table < 0, table.shape[0], entries)
    window = torch.cat((cached, fresh)).index_select(0, source)
    keys_HDN = window[:, 0].flatten(0, 1).permute(1, 2, 0)
    values_HND = window[:, 1].flatten(0, 1).transpose(0, 1)
    scores_HLN = (q.to(torch.float32).transpose(0, 1) * q.shape[-1] ** -0.5) @ keys_HDN
    return (torch.softmax(scores_HLN, dim=-1) @ values_HND).transpose(0, 1).contiguous().to(q.dtype)
