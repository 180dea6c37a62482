"""Linears as a library computes them: the plain PyTorch truth. Exports to ONNX as it stands.

Legend: T tokens, K in features, N out features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T,K], weight [N,K], bias [N] to [T,N] in x's dtype: product and sum in fp32, rounded once."""
    return functional.linear(x.float(), weight.float(), bias.float()).to(x.dtype)


def linear_gelu_bf16(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same with GELU (tanh) before the rounding."""
    return functional.gelu(functional.linear(x.float(), weight.float(), bias.float()), approximate="tanh").to(x.dtype)


def linear_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """x E4M3 [T,K], weight E4M3 [N,K] to bf16 [T,N]: codes multiplied as they stand and added up in fp32."""
    return functional.linear(x.float(), weight.float()).to(torch.bfloat16)


def linear_rows_fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same times `scale` fp32 [N], plus `bias` [N], rounded to its dtype after that."""
    return (functional.linear(x.float(), weight.float()) * scale + bias.float()).to(bias.dtype)
