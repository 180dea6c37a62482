"""The norms of a DiT block with residual and modulation: the plain PyTorch truth. Exports to ONNX as it stands.

It is what the DiT computes in training, so the two cannot differ. Legend: L tokens, C features, F latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtake.plugins import pointwise
from longtake.plugins.quantize_fp8.reference import quantize_fp8

BLOCK_NORM_EPS = 1e-6


@dataclass(frozen=True)
class BlockNorm:
    """Which row of a block's modulation (0 to 5) a norm of the DiT takes for what. gate: of the y that is added to x
    before; None: y is added as it is. scale, shift: None for an affine norm (weight, bias). following: scale and shift
    are those of the next block. residual: whether there is a y."""

    gate: int | None = None
    scale: int | None = None
    shift: int | None = None
    residual: bool = True
    following: bool = False


BLOCK_NORMS: dict[str, BlockNorm] = {
    "norm_modulate": BlockNorm(scale=1, shift=0, residual=False),  # before the first block's self-attention
    "gated_norm_affine": BlockNorm(gate=2),  # self-attention's end, cross-attention's norm
    "residual_norm_modulate": BlockNorm(scale=4, shift=3),  # cross-attention's end, the FFN's norm
    "gated_norm_modulate": BlockNorm(gate=5, scale=1, shift=0, following=True),  # the FFN's end, the next block's norm
}


def block_norm(name: str, fp8: bool, tensors: dict[str, Tensor]) -> Any:
    """The op `name` of BLOCK_NORMS on its inputs by name: n, or x_out and n, all [L,C]."""
    form, x, e = BLOCK_NORMS[name], tensors["x"], tensors["e"]

    def row(index: int, of: str = "modulation") -> Tensor:
        return tensors[of][0, index].to(torch.float32) + e[:, index].to(torch.float32)

    if form.residual:
        y = tensors["y"]
        if fp8:
            y = y.to(torch.float32) * tensors["y_scale"] + tensors["y_bias"].to(torch.float32)
        x = pointwise.gated_add(x, y, row(form.gate)) if form.gate is not None else _sum(x, y)
    if form.scale is None:
        n = pointwise.layer_norm(x, BLOCK_NORM_EPS, tensors["weight"], tensors["bias"]).to(x.dtype)
    else:
        of = "next_modulation" if form.following else "modulation"
        n = pointwise.modulate(x, BLOCK_NORM_EPS, row(form.scale, of), row(form.shift or 0, of))
    if fp8:
        n = quantize_fp8(n, tensors["factor"])
    return (x, n) if form.residual else n


def _sum(x: Tensor, y: Tensor) -> Tensor:
    return (x.to(torch.float32) + y.to(torch.float32)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [L,C], weight [C] to [L,C]: normalised, rounded, weighted and rounded again."""
    return pointwise.rms_norm(x, weight, pointwise.QK_NORM_EPS)
