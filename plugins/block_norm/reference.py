"""The norms of a DiT block with residual and modulation: the plain PyTorch truth. Exports to ONNX as it stands.

It is what the DiT computes in training, so the two cannot differ. Legend: L tokens, C features, F latent frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longtake.plugins import pointwise, spec
from longtake.plugins.quantize_fp8.reference import quantize_fp8
from longtake.plugins.spec import BLOCK_NORM_EPS, BLOCK_NORMS, QK_NORM_EPS


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


def _reference(name: str, fp8: bool) -> Callable[..., Any]:
    names = [tensor.name for tensor in spec.block_norm(name, fp8).inputs]
    return lambda *given: block_norm(name, fp8, dict(zip(names, given, strict=True)))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [L,C], weight [C] to [L,C]: normalised, rounded, weighted and rounded again."""
    return pointwise.rms_norm(x, weight, QK_NORM_EPS)


BLOCK_NORM_REFERENCES: dict[str, Callable[..., Any]] = {
    spec.block_norm(name, fp8).name: _reference(name, fp8) for name in BLOCK_NORMS for fp8 in (False, True)
}
