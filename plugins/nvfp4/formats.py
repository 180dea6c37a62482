"""E2M1 and E4M3 as arithmetic and tables: no bit casts, no float8 type, so the same lines run eagerly and export to ONNX.

A small float's codes, read as integers, are a concave piecewise-linear function of its value whose slopes are powers of
two. Rounding each linear piece half to even is exactly round-half-even on the format's grid (pieces start at even codes).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9

E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""Value of each E2M1 code, sign<<3 | exp<<1 | mantissa."""

E4M3_VALUES = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
"""Value of each E4M3 byte (0x7f and 0xff are NaN)."""

_NIBBLE_PAIRS = torch.stack((E2M1_VALUES.repeat(16), E2M1_VALUES.repeat_interleave(16)), dim=1)
_E4M3_EXPONENTS = range(-6, 9)
_E4M3_SLOPES = torch.tensor([2.0 ** (3 - e) for e in _E4M3_EXPONENTS])
_E4M3_INTERCEPTS = torch.tensor([8.0 * (e + 6) for e in _E4M3_EXPONENTS])


def _e2m1_steps(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed whole steps of 0.5 up to 2, of 1 from there to 4, of 2 from there to 6: each is one code further."""
    low = x.clamp(-2.0, 2.0)
    rest = x - low
    middle = rest.clamp(-2.0, 2.0)
    high = (rest - middle).clamp(-2.0, 2.0)
    return torch.round(low * 2.0), torch.round(middle), torch.round(high * 0.5)


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 value (ties to the even code), saturating at +-6. fp32 in and out, any shape."""
    low, middle, high = _e2m1_steps(x)
    return low * 0.5 + middle + high * 2.0


def encode_e2m1(x: Tensor) -> Tensor:
    """E2M1 codes 0..15, as fp32 integers, of round_e2m1(x), fp32.

    A negative number that rounds to zero has code 8; -0.0 has code 0 (as in ModelOpt).
    """
    low, middle, high = _e2m1_steps(x)
    return (low + middle + high).abs() + (x < 0.0).to(torch.float32) * 8.0


def decode_nibbles(byte: Tensor) -> Tensor:
    """Bytes 0..255, as int32 [..., K/2], to E2M1 values fp32 [..., K]; the low nibble is the even index."""
    return embedding(byte, _on(byte.device, _NIBBLE_PAIRS)).flatten(-2)


def encode_e4m3(x: Tensor) -> Tensor:
    """E4M3 codes 0..126, as fp32 integers, of non-negative fp32 x: nearest, ties to even, saturating at 448."""
    slopes, intercepts = _on(x.device, _E4M3_SLOPES), _on(x.device, _E4M3_INTERCEPTS)
    return (torch.round(x.clamp(max=E4M3_MAX).unsqueeze(-1) * slopes) + intercepts).amin(dim=-1)


def decode_e4m3(byte: Tensor) -> Tensor:
    """The fp32 values of E4M3 bytes 0..255 given as int32."""
    return embedding(byte, _on(byte.device, E4M3_VALUES).unsqueeze(-1)).squeeze(-1)


def _on(device: torch.device, table: Tensor) -> Tensor:
    return _copy(device, table) if device.type == "cuda" else table.to(device)


@cache
def _copy(device: torch.device, table: Tensor) -> Tensor:
    """Kept on a GPU: copying from the host can't be captured in a CUDA graph."""
    return table.to(device)
