"""The NVFP4 codec in PyTorch: the truth that kernels, ONNX bodies and training fake-quant are checked against.

NVFP4: blocks of 16 E2M1 elements along the last dimension, one E4M3 scale a block, one fp32 amax a tensor.

A *rule* fixes the scale's targets (M2 for E2M1, M3 for E4M3). `static_6` and `static_4` map a block's maximum to 6 or 4.
Four-over-six (`mse`, `mae`, `abs_max`) tries both and keeps 4 iff its error is strictly smaller.

An arithmetic *order* fixes the last bits, with g = amax / (M2 M3) and enc = M2 M3 / amax, all in fp32:

order       block scale S                        element                         dequantized         bit-equal to
modelopt    e4m3(blockmax / (M2 g)), >= 2^-9,    e2m1(x / (S g))                 q * (S g)           ModelOpt NVFP4QTensor,
            and 1 for a block of zeros                                                               ml_dtypes (static_6)
longlive    e4m3(blockmax / M2 * enc)            e2m1(x * (1 / ((1 / enc) S)))   q * S * amax / M2M3 LongLive 2.0's codec

q * S * amax overflows fp32 for amax above 1.2e35 (longlive); an amax too small to divide by gives zeros.

Candidate errors of four-over-six are sums over a block in a fixed order, so that every implementation takes the same
decision: e[i] + e[i+8], then [i+4], [i+2], [i+1] (what a butterfly of xor shuffles computes); for a 16x16 tile first
over columns, then over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.nvfp4.formats import (
    E4M3_MIN_SUBNORMAL,
    decode_e4m3,
    decode_nibbles,
    encode_e2m1,
    encode_e4m3,
    round_e2m1,
)
from longtake.plugins.nvfp4.layout import pack_nibbles

BLOCK = 16
ORDERS = ("modelopt", "longlive")
RULE_LIMITS: dict[str, tuple[float, float]] = {
    "static_6": (6.0, 448.0),
    "static_4": (4.0, 448.0),
    "mse": (6.0, 256.0),
    "mae": (6.0, 256.0),
    "abs_max": (6.0, 256.0),
}

Rounding = Callable[[Tensor], Tensor]
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Packed:
    """A tensor [..., K] in NVFP4: 4.5 bits an element, plus amax.

    values: uint8 [..., K/2], low nibble = even index. scales: float8_e4m3fn [..., K/16], not swizzled.
    amax: fp32, a scalar or broadcastable to scales. rule: one of RULE_LIMITS.
    """

    values: Tensor
    scales: Tensor
    amax: Tensor
    rule: str


def quantize(
    x: Tensor,
    *,
    rule: str = "static_6",
    order: str = "modelopt",
    amax: Tensor | float | None = None,
    block_2d: bool = False,
) -> Packed:
    """Quantize x [..., K] (any float dtype, K a multiple of 16) in blocks of 16 along K, or tiles of 16 x 16.

    amax: fp32 override, a scalar or broadcastable to [..., K/16]; by default max |x| over the tensor.

    Raises:
        LongtakeError: unknown rule or order, or a shape that does not divide into blocks.
    """
    blocks, amax = _prepare(x, rule, order, amax, block_2d)
    scaled, scale = scale_blocks(blocks, amax, rule, order, block_2d)
    values = pack_nibbles(encode_e2m1(scaled).to(torch.uint8).flatten(-2))
    return Packed(values, encode_e4m3(scale).to(torch.uint8).view(torch.float8_e4m3fn), amax, rule)


def dequantize(packed: Packed, *, order: str = "modelopt", dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [..., K] of a packed tensor, computed in fp32 in the given order, then cast to `dtype`."""
    _check_rule(packed.rule, order)
    q = decode_nibbles(packed.values.to(torch.int32)).unflatten(-1, (-1, BLOCK))
    scale = decode_e4m3(packed.scales.view(torch.uint8).to(torch.int32))
    return dequantize_blocks(q, scale, packed.amax, packed.rule, order).flatten(-2).to(dtype)


def fake_quantize(
    x: Tensor,
    *,
    rule: str = "static_6",
    order: str = "modelopt",
    amax: Tensor | float | None = None,
    block_2d: bool = False,
    rounding: Rounding | None = None,
) -> Tensor:
    """dequantize(quantize(x, ...)) in the dtype of x, without packing; no gradient of its own.

    rounding: to E2M1 values, instead of to the nearest; four-over-six decides by what it gives.
    """
    with torch.no_grad():
        blocks, amax = _prepare(x, rule, order, amax, block_2d)
        scaled, scale = scale_blocks(blocks, amax, rule, order, block_2d, rounding)
        return dequantize_blocks(round_e2m1(scaled), scale, amax, rule, order).flatten(-2).to(x.dtype)


def scale_blocks(
    x: Tensor, amax: Tensor, rule: str, order: str, block_2d: bool = False, rounding: Rounding | None = None
) -> tuple[Tensor, Tensor]:
    """The codec's core, exportable to ONNX: fp32 blocks x [..., K/16, 16] to (scaled x, block scales [..., K/16]).

    The scaled elements are still to be rounded (encode_e2m1, round_e2m1), unless `rounding` has done so; the scales are
    fp32 and exact E4M3 values. amax: fp32, broadcastable to [..., K/16].
    """
    m2, m3 = RULE_LIMITS[rule]
    blockmax = _over_tile(x.abs().amax(dim=-1), block_2d, torch.amax)
    base = _base_scale(blockmax, amax, m2, m3, order)
    six = _candidate(x, base, blockmax, amax, m2 * m3, order)
    if rounding is not None:
        six = rounding(six[0]), six[1]
    if rule.startswith("static"):
        return six
    four = _candidate(x, base * 1.5, blockmax, amax, m2 * m3, order)
    if rounding is not None:
        four = rounding(four[0]), four[1]
    error4, error6 = (
        _error(dequantize_blocks(round_e2m1(y), s, amax, rule, order) - x, rule, block_2d) for y, s in (four, six)
    )
    better = error4 < error6
    return torch.where(better.unsqueeze(-1), four[0], six[0]), torch.where(better, four[1], six[1])


def dequantize_blocks(q: Tensor, scale: Tensor, amax: Tensor, rule: str, order: str) -> Tensor:
    """fp32 E2M1 values [..., K/16, 16] and E4M3 values [..., K/16] to fp32 [..., K/16, 16]; exportable to ONNX."""
    m2, m3 = RULE_LIMITS[rule]
    if order == "modelopt":
        return q * (scale * (amax / _fp32(m2 * m3, amax))).unsqueeze(-1)
    return q * scale.unsqueeze(-1) * amax.unsqueeze(-1) / _fp32(m2 * m3, amax)


def _base_scale(blockmax: Tensor, amax: Tensor, m2: float, m3: float, order: str) -> Tensor:
    """The block scale before rounding to E4M3; 0 where amax is 0 or too small to divide by."""
    if order == "modelopt":
        g = amax / _fp32(m2 * m3, amax)
        return torch.where(g > 0.0, blockmax / (m2 * g), 0.0)
    return blockmax / _fp32(m2, amax) * _encode_scale(amax, m2 * m3)


def _encode_scale(amax: Tensor, limit: float) -> Tensor:
    """enc = limit / amax, or 0 where that is not finite (amax below about 5e-36), which makes everything zero."""
    enc = _fp32(limit, amax) / amax
    return torch.where(enc <= _FLOAT32_MAX, enc, 0.0)


def _fp32(value: float, like: Tensor) -> Tensor:
    """A 0-d tensor to divide with: with a Python number, torch rounds twice (number / tensor; tensor / number on GPUs)."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _candidate(
    x: Tensor, raw: Tensor, blockmax: Tensor, amax: Tensor, limit: float, order: str
) -> tuple[Tensor, Tensor]:
    """Round the scale to E4M3 and divide the elements by it."""
    if order == "modelopt":
        raw = torch.where(blockmax == 0.0, 1.0, raw.clamp(min=E4M3_MIN_SUBNORMAL))
        scale = decode_e4m3(encode_e4m3(raw).to(torch.int32))
        step = scale * (amax / _fp32(limit, amax))
        return x / torch.where(step > 0.0, step, torch.inf).unsqueeze(-1), scale
    scale = decode_e4m3(encode_e4m3(raw).to(torch.int32))
    step = (1.0 / _encode_scale(amax, limit)) * torch.where(scale > 0.0, scale, 1.0)
    inverse = torch.where(scale > 0.0, 1.0 / step, 0.0)
    return x * inverse.unsqueeze(-1), scale


def _error(difference: Tensor, rule: str, block_2d: bool) -> Tensor:
    """The rule's error of each block [..., K/16], replicated over a tile's rows; the additions' order is fixed."""
    if rule == "abs_max":
        return _over_tile(difference.abs().amax(dim=-1), block_2d, torch.amax)
    errors = _halving_sum(difference * difference if rule == "mse" else difference.abs())
    return _over_tile(errors, block_2d, lambda x, dim: _halving_sum(x.transpose(dim, -1)))


def _halving_sum(x: Tensor) -> Tensor:
    """Sum over a last dimension of 16: first i with i + 8, then 4, 2, 1."""
    for half in (8, 4, 2, 1):
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _over_tile(per_row: Tensor, block_2d: bool, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce [..., R, K/16] over the 16 rows of a tile and give each row the result; no-op for 1-D blocks."""
    if not block_2d:
        return per_row
    return reduce(per_row.unflatten(-2, (-1, BLOCK)), dim=-2).repeat_interleave(BLOCK, dim=-2)


def _prepare(x: Tensor, rule: str, order: str, amax: Tensor | float | None, block_2d: bool) -> tuple[Tensor, Tensor]:
    """Check the arguments; fp32 blocks [..., K/16, 16] and an fp32 amax."""
    _check_rule(rule, order)
    if x.ndim < 1 or x.shape[-1] % BLOCK or (block_2d and (x.ndim < 2 or x.shape[-2] % BLOCK)):
        raise LongtakeError(
            "this shape does not divide into NVFP4 blocks",
            got=list(x.shape),
            expected=f"last two dimensions multiples of {BLOCK}"
            if block_2d
            else f"a last dimension multiple of {BLOCK}",
            fix="pad the tensor with zeros, or leave it unquantized",
        )
    blocks = x.to(torch.float32).unflatten(-1, (-1, BLOCK))
    if amax is None:
        amax = blocks.abs().amax() if blocks.numel() else blocks.new_zeros(())
    return blocks, torch.as_tensor(amax, dtype=torch.float32, device=x.device)


def _check_rule(rule: str, order: str) -> None:
    for kind, got, known in (("rule", rule, tuple(RULE_LIMITS)), ("order", order, ORDERS)):
        if got not in known:
            raise LongtakeError(
                f"unknown NVFP4 {kind}", got=got, expected=", ".join(known), fix=f"choose a {kind} listed"
            )


def tensor_scale(amax: float, rule: str = "static_6") -> float:
    """g = amax / (M2 M3), of an activation amax / (6 * 448), rounded to fp32 as the codec does."""
    m2, m3 = RULE_LIMITS[rule]
    return float(np.float32(amax) / np.float32(m2 * m3))


def limit_macros(rule: str) -> dict[str, str | int | float]:
    """The codec's limits as the macros that codec.cuh expects."""
    m2, m3 = RULE_LIMITS[rule]
    return {"LIMIT_E2M1": f"{m2}f", "LIMIT_E4M3": f"{m3}f"}


PLACEHOLDER_AMAX = 8.0  # of activations in a graph exported without checkpoints: it must compute, not be accurate
