"""A safetensors file written one tensor after the other, so that memory holds one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from longtake.dtypes import of_torch


class Shaped(Protocol):
    """A tensor, or what is yet to become one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def write_tensors(
    out: BinaryIO,
    tensors: Mapping[str, Shaped],
    content: Callable[[str], Tensor],
    progress: Callable[[int], object] = lambda done: None,
) -> str:
    """Write `tensors`, the widest first and those of one width by name, and return the file's SHA-256.

    Where there is one dtype a width, these are the bytes that `safetensors.torch.save_file` writes.

    content: makes the tensor of a name. progress: called with the bytes of each tensor written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that each is aligned
    header = _header({name: tensors[name] for name in names})
    digest = hashlib.sha256(header)
    out.write(header)
    for name in names:
        raw = content(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest.update(raw)
        out.write(raw)
        progress(raw.nbytes)
        del raw
    return digest.hexdigest()


def _header(tensors: Mapping[str, Shaped]) -> bytes:
    """The head of a file that holds `tensors` in this order, without gaps."""
    entries: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, dtype = end, of_torch(tensor.dtype)
        end += dtype.bytes(torch.Size(tensor.shape).numel())
        entries[name] = {"dtype": dtype.safetensors, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
