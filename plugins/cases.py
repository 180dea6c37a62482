"""Inputs to try the ops with: plausible caches, odd sizes, every table. For tests, the sanitizer run and timings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.dtypes import DTYPES
from longtake.plugins.kernels import Dims
from longtake.plugins.registry import op_named
from longtake.plugins.shapes import shape_of, torch_dtype


def op_inputs(
    op_name: str, dims: Dims, dtype: str = "bf16", indices: Sequence[int] = (-1,), seed: int = 0
) -> tuple[Tensor, ...]:
    """CPU inputs of an op in spec order. `indices` is the write_slot [1] or the table [W]."""
    generator = torch.Generator().manual_seed(seed)
    op = op_named(op_name)
    special = op.inputs(op.spec, dims, DTYPES[dtype].torch, generator) if op.inputs else {}
    tensors = []
    for tensor in op.spec.inputs:
        if tensor.name in special:
            tensors.append(special[tensor.name])
        elif tensor.dtype == "int32":
            tensors.append(torch.tensor(indices, dtype=torch.int32))
        else:
            values = torch.randn(shape_of(tensor, dims), generator=generator)
            values = values.abs() + 0.1 if tensor.name.endswith("scale") else values
            tensors.append(values.to(torch_dtype(tensor, dtype)))
    return tuple(tensors)
