"""The 128x4 swizzle of the released checkpoints' block scales, which the library only undoes."""

from __future__ import annotations

import torch
from torch import Tensor


def swizzle_scales(scales: Tensor) -> Tensor:
    """[R, C] block scales to the flat 128x4 layout: rows padded to 128 and columns to 4 with zeros.

    Element (r, c) lies at (((r//128) * (C/4) + c//4) * 32 + r%32) * 16 + (r%128)//32 * 4 + c%4. Any one-byte dtype.
    """
    rows, cols = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -cols % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)
