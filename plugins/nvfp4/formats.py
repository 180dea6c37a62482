"""E2M1 and E4M3 as arithmetic: no bit casts and no float8 type, so that the same lines run in eager mode and export to ONNX.

A small float's codes, read as integers, are a convex piecewise-linear function of its value with slopes that are powers
of two. So decoding is a maximum over lines, encoding a minimum, and rounding each line half to even before the minimum
is exactly round-half-even on the format's grid (the intercepts are even, rounding is monotone).
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_E4M3_EXPONENTS = range(-6, 9)


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 value (ties to the even code), saturating at +-6. fp32 in and out, any shape."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return (torch.round(x / step) * step).clamp(-E2M1_MAX, E2M1_MAX)


def encode_e2m1(x: Tensor) -> Tensor:
    """E2M1 codes 0..15 (sign<<3 | exp<<1 | mantissa), as fp32 integers, of round_e2m1(x).

    A negative number that rounds to zero has code 8; -0.0 has code 0 (as in ModelOpt).
    """
    y = x.abs()
    code = torch.minimum(torch.round(y * 2.0), torch.round(y) + 2.0)
    code = torch.minimum(code, torch.round(y * 0.5) + 4.0).clamp(max=7.0)
    return torch.where(x < 0.0, code + 8.0, code)


def decode_e2m1(code: Tensor) -> Tensor:
    """The values of E2M1 codes 0..15 given as fp32 integers."""
    magnitude = torch.where(code >= 8.0, code - 8.0, code)
    value = torch.maximum(torch.maximum(magnitude * 0.5, magnitude - 2.0), magnitude * 2.0 - 8.0)
    return torch.where(code >= 8.0, -value, value)


def _e4m3_lines(device: torch.device) -> tuple[Tensor, Tensor]:
    """(slope [15], intercept [15]) of the encoding: code = slope * value + intercept on the binade of that exponent."""
    slopes = torch.tensor([2.0 ** (3 - e) for e in _E4M3_EXPONENTS], device=device)
    intercepts = torch.tensor([8.0 * (e + 6) for e in _E4M3_EXPONENTS], device=device)
    return slopes, intercepts


def encode_e4m3(x: Tensor) -> Tensor:
    """E4M3 codes 0..126, as fp32 integers, of non-negative fp32 x: nearest, ties to even, saturating at 448."""
    slopes, intercepts = _e4m3_lines(x.device)
    lines = torch.round(x.clamp(max=E4M3_MAX).unsqueeze(-1) * slopes) + intercepts
    return lines.amin(dim=-1)


def decode_e4m3(code: Tensor) -> Tensor:
    """The values of non-negative E4M3 codes 0..126 given as fp32 integers."""
    slopes, intercepts = _e4m3_lines(code.device)
    return ((code.unsqueeze(-1) - intercepts) / slopes).amax(dim=-1)
