"""Gradients in NVFP4, emulated: the numbers a 4-bit backward pass would give, from ordinary matrix products.

This is an emulation. It shows what 4-bit gradients do to a training run; it is slower than training without it, and no
4-bit arithmetic takes place. As LongLive trains (all amax here are per call):

  dX = Q_sr(dY) W_q                      dY in blocks along the output features, stochastically rounded; W as forwards
  dW = Q_sr(H dY)^T Q(H X_q)             both in blocks along the tokens, after a random Hadamard transform H of each 16
  db = sum of dY, not quantized

H is orthogonal, so it cancels in the product; it spreads outliers over their block. W in tiles of 16 x 16 has the same
codes along either dimension; with scales along a row it is quantized once more along the column.

Random numbers come from torch's default generator of the device (a captured CUDA graph advances that one): seed it
before every step that shall be repeatable.
"""

from __future__ import annotations

import logging
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.errors import LongtakeError
from longtake.plugins.nvfp4.formats import E2M1_MAX
from longtake.plugins.nvfp4.reference import BLOCK, fake_quantize
from longtake.training.models.families import linears_of
from longtake.training.models.quantize import SIDES, Rules

logger = logging.getLogger(__name__)

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def round_stochastically(x: Tensor) -> Tensor:
    """One of the two E2M1 values around each x, the nearer the likelier: the mean is x. Saturates at +-6."""
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    low = (size / step).floor() * step
    up = torch.rand_like(size) * step < size - low
    return torch.copysign(low + up * step, x)


@cache
def hadamard(device: torch.device) -> Tensor:
    """The random Hadamard transform of 16: orthogonal, fp32 [16, 16], H_ij = signs_i (-1)^popcount(i & j) / 4."""
    rows = [[SIGNS[i] * (-1) ** (i & j).bit_count() / 4 for j in range(BLOCK)] for i in range(BLOCK)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def along_tokens(x: Tensor) -> Tensor:
    """x [tokens, features] as [features, tokens], Hadamard-transformed in groups of 16 tokens, fp32.

    The last group is filled up with zeros.
    """
    columns = functional.pad(x.float().t(), (0, -len(x) % BLOCK))
    return (columns.unflatten(1, (-1, BLOCK)) @ hadamard(x.device)).flatten(1)


class QuantizedGradients(torch.autograd.Function):
    """x W^T + b of quantized x [tokens, in] and W [out, in], with the backward pass described above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, back: Tensor, rule: str) -> Tensor:
        ctx.save_for_backward(x, back)
        ctx.rule, ctx.has_bias = rule, bias is not None
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:  # type: ignore[override]
        x, back = ctx.saved_tensors
        along_features = fake_quantize(grad, rule=ctx.rule, rounding=round_stochastically)
        columns = fake_quantize(along_tokens(grad), rule=ctx.rule, rounding=round_stochastically).to(x.dtype)
        inputs = fake_quantize(along_tokens(x), rule=ctx.rule).to(x.dtype)
        bias = grad.sum(0) if ctx.has_bias else None
        return along_features @ back, columns @ inputs.t(), bias, None, None


def quantized_forward(linear: Any, x: Tensor) -> Tensor:
    """The forward pass of a linear with fake-quant, whose gradients are quantized, too."""
    x_q, weight = linear.input_quantizer(x), linear._parameters["weight"]
    weight_q = linear.weight_quantizer(weight)
    back = weight_q.detach() if linear.gradient_rules.weight.block_2d else _by_column(weight.detach(), linear)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_q.dtype
    bias = None if linear.bias is None else linear.bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        out = QuantizedGradients.apply(
            x_q.to(dtype).flatten(0, -2), weight_q.to(dtype), bias, back.to(dtype), linear.gradient_rules.gradient
        )
    return out.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def _by_column(weight: Tensor, linear: Any) -> Tensor:
    form = linear.gradient_rules.weight
    amax = linear.weight_quantizer.amax.max()
    return fake_quantize(weight.t().contiguous(), rule=form.rule, order=form.order, amax=amax).t()


def quantize_gradients(dit: nn.Module, rules: Rules) -> None:
    """Let the listed linears of `dit`, which carry fake-quant, quantize their gradients as well, in place.

    Raises:
        LongtakeError: `dit` has no quantizers yet, or a linear's sizes are no multiples of 16.
    """
    for name in linears_of(dit):
        linear = dit.get_submodule(name)
        if not all(hasattr(linear, side) for side in SIDES.values()):
            what, got = "gradients are quantized where weights and activations are", f"{name} without"
            raise LongtakeError(what, got=got, expected="quantizers inserted first", fix="--precision nvfp4")
        if linear.in_features % BLOCK or linear.out_features % BLOCK:  # type: ignore[operator]
            what = f"the gradients of {name} don't divide into NVFP4 blocks"
            raise LongtakeError(what, expected="multiples of 16", got=f"{linear.out_features} x {linear.in_features}")
        linear.gradient_rules = rules  # type: ignore[assignment]
        linear.forward = MethodType(quantized_forward, linear)  # type: ignore[method-assign, assignment]
    logger.warning("4-bit gradients are emulated: the numbers are those of 4 bits, the arithmetic and the time aren't")
