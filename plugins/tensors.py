"""The dtypes of an op's tensors in torch."""

from __future__ import annotations

import torch

from longtake.dtypes import DTYPES
from longtake.plugins.spec import TensorSpec


def torch_dtype(tensor: TensorSpec, compute: str = "bf16") -> torch.dtype:
    """The dtype of a tensor where activations are `compute`."""
    return DTYPES[compute if tensor.dtype == "compute" else tensor.dtype].torch
