"""The E4M3 codec: per-tensor multipliers and the codes of quantized rows."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.plugins.nvfp4.formats import E4M3_MAX

SMALLEST_AMAX = 2.0**-24  # below it ModelOpt takes an amax for zero and quantizes with amax 1


def multiplier(amax: Tensor) -> Tensor:
    """fp32 factor that brings values up to `amax` into E4M3's range, as ModelOpt computes it."""
    amax = amax.float()
    return E4M3_MAX / torch.where(amax <= SMALLEST_AMAX, torch.ones_like(amax), amax)


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (E4M3 [N, K]) and scales (fp32 [N]) of a weight [N, K], each row by its own maximum; equal to ModelOpt's."""
    weight = weight.detach().float()
    factor = multiplier(weight.abs().amax(dim=1))
    codes = (weight * factor[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, 1 / factor
