"""Attention over slots that hold chunks of different lengths: the plain PyTorch truth. Exports to ONNX as it stands.

Legend: T frames of a chunk, P tokens of a frame, S slots, L tokens that a slot has room for, H heads, D head_dim, W window
length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frame_attention(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
    """q, k, v [T,P,H,D]; cache [S,2,L,H,D]; lengths int32 [S], tokens that each slot holds; table int32 [W], -1 is k, v.

    softmax(q k^T / sqrt(D)) v in fp32 over the slots in the table, each as long as it is. Returns [T,P,H,D] in q's dtype.
    """
    own = [x.float().flatten(0, 1).transpose(0, 1) for x in (q, k, v)]  # [H, N, D]
    slots = table.clamp(min=0).long()
    seen = cache.index_select(0, slots).float()  # [W, 2, L, H, D]
    held = torch.where(table < 0, 0, lengths.index_select(0, slots))
    there = torch.arange(cache.shape[2], device=q.device) < held[:, None]
    keys, values = (seen[:, i].flatten(0, 1).transpose(0, 1) for i in (0, 1))
    past = own[0] @ keys.mT * q.shape[-1] ** -0.5
    past = torch.where(there.flatten(), past, float("-inf"))
    here = own[0] @ own[1].mT * q.shape[-1] ** -0.5
    current = torch.where((table < 0).any(), 0.0, float("-inf"))
    weights = torch.softmax(torch.cat((past, here + current), -1), -1)
    out = weights @ torch.cat((values, own[2]), 1)
    return out.transpose(0, 1).reshape(q.shape).contiguous().to(q.dtype)
