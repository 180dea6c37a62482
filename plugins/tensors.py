"""The dtypes of an op's tensors in torch."""

from __future__ import annotations

import torch

from longtake.plugins.spec import TensorSpec

TORCH_DTYPES = {
    "int8": torch.int8,
    "int32": torch.int32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(tensor: TensorSpec, compute: str = "bf16") -> torch.dtype:
    """The dtype of a tensor where activations are `compute`."""
    return TORCH_DTYPES[compute if tensor.dtype == "compute" else tensor.dtype]
