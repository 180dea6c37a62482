"""E4M3 codes of activations: the plain PyTorch truth, equal to ModelOpt's fake-quant. Exports to ONNX as it stands.

Legend: L tokens, C features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.nvfp4.formats import E4M3_MAX


def quantize_fp8(x: Tensor, factor: Tensor) -> Tensor:
    """x [L,C] and factor fp32 [1] to E4M3 [L,C]; what is beyond +-448 becomes that."""
    return (x.to(torch.float32) * factor).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def gelu_quantize_fp8(x: Tensor, scale: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    """The same of GELU (tanh) of x * scale + bias, rounded to x's dtype before; scale fp32 [C], bias [C]."""
    whole = x.to(torch.float32) * scale + bias.to(torch.float32)
    return quantize_fp8(functional.gelu(whole, approximate="tanh").to(x.dtype), factor)
