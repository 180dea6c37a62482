"""Device memory by address as torch tensors, for launchers that call torch: executors hand over raw addresses."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


class _Memory:
    """Device memory as __cuda_array_interface__ describes it, which has neither bf16 nor FP8."""

    def __init__(self, address: int, shape: tuple[int, ...], itemsize: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": f"<i{itemsize}" if itemsize > 1 else "|i1", "data": (address, False),
            "version": 3, "strides": None,
        }  # fmt: skip


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The memory at `address` on the current device as a contiguous tensor; its owner must outlive the tensor."""
    memory = _Memory(address, shape, dtype.itemsize)
    return torch.as_tensor(memory, device=f"cuda:{torch.cuda.current_device()}").view(dtype)


def on_stream(stream: int) -> AbstractContextManager[object]:
    """torch's current stream is the one of raw handle `stream` within."""
    current = torch.cuda.current_stream()
    return torch.cuda.stream(current if current.cuda_stream == stream else torch.cuda.ExternalStream(stream))
