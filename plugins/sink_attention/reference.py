"""Attention over the cache slots that a table lists: the plain PyTorch truth. Exports to ONNX as it stands.

Only the listed slots are dequantized. No mask: queries see every key of every listed slot, in any order.
Legend: S slots, L tokens, H heads, D head_dim, W window length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.plugins.kv_cache_write.reference import ORDER, RULE
from longtake.plugins.nvfp4.formats import E4M3_MAX, decode_e4m3, decode_nibbles
from longtake.plugins.nvfp4.layout import bytes_from_int8
from longtake.plugins.nvfp4.reference import BLOCK, dequantize_blocks

TILE = 128  # keys that FP8 attention looks at together
SMALLEST = 1e-15  # magnitude that counts


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


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, largest: Sequence[Tensor | float] | None = None) -> Tensor:
    """What hopper_fp8.cu computes, up to the order of its sums: softmax(q k^T / sqrt(D)) v over E4M3 numbers, in fp32.

    q, k and v have one scale each (of a batch entry: all heads, tokens and features). Probabilities are E4M3 of up to 448
    times what they are before normalization, relative to the largest of the tiles of keys so far; what normalizes them is
    the sum of those E4M3 numbers.

    Args:
        q: [B,H,L,D]. k, v: [B,H,N,D].
        largest: magnitudes of q, k and v that become 448, each a number or [B,1,1,1]; None: their own.

    Returns:
        fp32 [B,H,L,D].
    """
    with torch.autocast(q.device.type, enabled=False):
        return _attention_fp8(q, k, v, largest)


def _attention_fp8(q: Tensor, k: Tensor, v: Tensor, largest: Sequence[Tensor | float] | None) -> Tensor:
    own = largest or [x.float().abs().amax((1, 2, 3), keepdim=True).clamp(min=SMALLEST) for x in (q, k, v)]
    q, k, v = (_e4m3(x.float() * (E4M3_MAX / most)) * (most / E4M3_MAX) for x, most in zip((q, k, v), own))
    top = torch.full((*q.shape[:-1], 1), -torch.inf, device=q.device)
    out, total = torch.zeros_like(q), torch.zeros_like(top)
    for keys, values in zip(k.split(TILE, -2), v.split(TILE, -2)):
        scores = q @ keys.mT * q.shape[-1] ** -0.5
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        shrink, weights = torch.exp(top - higher), _e4m3(torch.exp(scores - higher) * E4M3_MAX)
        out, total, top = out * shrink + weights @ values, total * shrink + weights.sum(-1, keepdim=True), higher
    return out / total


def _e4m3(x: Tensor) -> Tensor:
    """fp32 rounded to E4M3 numbers, what is beyond +-448 to that."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
