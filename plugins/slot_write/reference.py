"""Writing what a chunk leaves into one slot of a state: the plain PyTorch truth. Exports to ONNX as it stands.

Legend: S slots, N elements that are written, K elements that a slot has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def slot_write(value: Tensor, state: Tensor, write_slot: Tensor) -> Tensor:
    """value [N], state [S,K], write_slot int32 [1]. Returns the state with `value` at the start of the slot.

    The slot is write_slot modulo S, so that states of different numbers of slots can share it; below 0 nothing is written.
    """
    slots, room = state.shape
    rows = torch.arange(slots, device=state.device) == torch.remainder(write_slot, slots)
    rows = rows & (write_slot >= 0)
    columns = torch.arange(room, device=state.device) < value.shape[0]
    padded = functional.pad(value.to(state.dtype), (0, room - value.shape[0]))
    return torch.where(rows[:, None] & columns, padded, state)
