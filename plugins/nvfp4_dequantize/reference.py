"""Unpack 4-bit weights: the plain PyTorch truth. Exports to ONNX as it stands. Legend: N out, K in features."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.plugins.nvfp4.formats import decode_e4m3, decode_nibbles
from longtake.plugins.nvfp4.layout import bytes_from_int8
from longtake.plugins.nvfp4.reference import BLOCK


def nvfp4_dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """values int8 [N,K/2], scales int8 [N,K/16] to bf16 [N,K]: E2M1 x E4M3, exact (6 significant bits at most).

    The per-tensor scale, amax / (6 * 448), is left for the product's output.
    """
    return decode_weight(values, scales).to(torch.bfloat16)


def nvfp4_dequantize_scaled(values: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """The same times the tensor's scale, fp32 [], for products that nothing of ours follows, such as a library's.

    Rounding to bf16 moves a weight by 2^-9 of it at most, which is far below what 4 bits cost.
    """
    return (decode_weight(values, scales) * scale).to(torch.bfloat16)


def decode_weight(values: Tensor, scales: Tensor) -> Tensor:
    """The same in fp32."""
    elements = decode_nibbles(bytes_from_int8(values)).unflatten(-1, (-1, BLOCK))
    return (elements * decode_e4m3(bytes_from_int8(scales)).unsqueeze(-1)).flatten(-2)
