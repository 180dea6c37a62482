"""Where the bits lie: nibbles in bytes, and the 128x4 swizzle of the released checkpoints' block scales."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.errors import LongtakeError


def pack_nibbles(code: Tensor) -> Tensor:
    """Codes 0..15 (any dtype) [..., K] to bytes 0..255 of the same dtype [..., K/2]; the low nibble is the even index."""
    pairs = code.unflatten(-1, (-1, 2))
    return pairs[..., 0] + pairs[..., 1] * 16


def int8_from_bytes(byte: Tensor) -> Tensor:
    """fp32 integers 0..255 to the int8 of the same bits."""
    return (byte - torch.floor(byte / 128.0) * 256.0).to(torch.int8)


def bytes_from_int8(byte: Tensor) -> Tensor:
    """int8 to the int32 0..255 of the same bits."""
    return byte.to(torch.int32) & 255


def unswizzle_scales(flat: Tensor, rows: int, cols: int) -> Tensor:
    """[rows, cols] block scales from the flat 128x4 layout, whose rows are padded to 128 and columns to 4. Any one-byte dtype.

    Element (r, c) lies at (((r//128) * (C/4) + c//4) * 32 + r%32) * 16 + (r%128)//32 * 4 + c%4.

    Raises:
        LongtakeError: if `flat` does not hold the padded rows x cols elements.
    """
    row_tiles, col_tiles = -(-rows // 128), -(-cols // 4)
    if flat.numel() != row_tiles * col_tiles * 512:
        raise LongtakeError(
            "swizzled block scales of the wrong size",
            got=f"{flat.numel()} elements",
            expected=f"{row_tiles * col_tiles * 512} for {rows} x {cols} scales padded to 128 x 4",
            fix="give the rows and columns of the unpadded scales: weight rows, and weight columns / 16",
        )
    tiles = flat.view(torch.uint8).view(row_tiles, col_tiles, 32, 4, 4)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * 128, col_tiles * 4)
    return padded[:rows, :cols].contiguous().view(flat.dtype)
