"""Attention over slots that hold chunks of different lengths: the plain PyTorch truth. Exports to ONNX as it stands.

Legend: T frames of a chunk, P tokens of a frame, S slots, L tokens that a slot has room for, H heads, D head_dim, W window
length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frame_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, table: Tensor
) -> Tensor:
    """q, k, v [T,P,H,D]; keys, values [S,L,H,D]; lengths int32 [S], tokens that each slot holds; table int32 [W], -1 is k, v.

    softmax(q k^T / sqrt(D)) v in fp32 over the slots in the table, each as long as it is. Returns [T,P,H,D] in q's dtype.
    """
    rows, own_keys, own_values = (x.float().flatten(0, 1).transpose(0, 1) for x in (q, k, v))  # [H, N, D]
    rows = rows * q.shape[-1] ** -0.5
    slots = table.clamp(min=0)
    held = torch.where(table < 0, 0, lengths.index_select(0, slots))
    there = torch.arange(keys.shape[1], device=q.device) < held[:, None]
    past_keys, past_values = (x.index_select(0, slots).float().flatten(0, 1).transpose(0, 1) for x in (keys, values))
    past = torch.where(there.flatten(), rows @ past_keys.mT, -torch.inf)
    own = torch.where((table < 0).any(), rows @ own_keys.mT, -torch.inf)
    weights = torch.softmax(torch.cat((past, own), -1), -1)
    out = weights @ torch.cat((past_values, own_values), 1)
    return out.transpose(0, 1).reshape(q.shape).contiguous().to(q.dtype)
