"""LongLive's packed 4-bit linears (`model_4o6.pt`) to weights, bit for bit what LongLive dequantizes.

In place of `weight` a linear has quantized_weight_values uint8 [out, in/2], ..._scale_factors E4M3 in the swizzled
128x4 layout, ..._amax fp32 and ..._metadata int32 (rows, columns, padded rows, padded columns). The rule of the block
scales isn't in the tensors; released files are four-over-six by square error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.plugins.nvfp4.layout import unswizzle_scales
from longtake.plugins.nvfp4.reference import BLOCK, RULE_LIMITS, Packed, dequantize
from longtake.training.convert.pending import Pending, pending

VALUES, SCALES, AMAX, METADATA = (
    f"quantized_weight_{part}" for part in ("values", "scale_factors", "amax", "metadata")
)
RULE, ORDER = "mse", "longlive"


def unpack(state: Mapping[str, Tensor], rule: str) -> tuple[dict[str, Pending], dict[str, float]]:
    """`state` with a `weight` for each packed linear, made when it is needed, and linear name -> amax it was packed with.

    Raises:
        IntegrityError: a packed linear's parts are missing or don't belong together.
    """
    names = [key.removesuffix(f".{VALUES}") for key in state if key.endswith(f".{VALUES}")]
    parts = {f"{name}.{part}" for name in names for part in (VALUES, SCALES, AMAX, METADATA)}
    tensors = {key: pending(value) for key, value in state.items() if key not in parts}
    amax = {}
    for name in names:

        def weight(name: str = name) -> Tensor:  # q * S * amax / (M2 M3), in that order
            return dequantize(packed_linear(name, state, rule), order=ORDER)

        tensors[f"{name}.weight"] = Pending(_shape(name, state), torch.float32, weight)
        amax[name] = float(state[f"{name}.{AMAX}"].float().reshape(()))
    return tensors, amax


def packed_linear(name: str, state: Mapping[str, Tensor], rule: str) -> Packed:
    """The packed weight of linear `name`, its scales in row order and its padding cut off."""
    rows, columns = _shape(name, state)
    padded_rows, padded_columns = _metadata(name, state)[2:]
    scales = unswizzle_scales(state[f"{name}.{SCALES}"].reshape(-1), padded_rows, padded_columns // BLOCK)
    values = state[f"{name}.{VALUES}"].reshape(padded_rows, padded_columns // 2)
    amax = state[f"{name}.{AMAX}"].float().reshape(())
    scales = scales.view(torch.float8_e4m3fn)[:rows, : columns // BLOCK]
    return Packed(values[:rows, : columns // 2].contiguous(), scales.contiguous(), amax, rule)


def rule_of(about: Mapping[str, Any], asked: str | None) -> str:
    """The rule the block scales were made with: as asked, as the container says, or that of the released files.

    Raises:
        LongtakeError: unknown rule.
    """
    told = about.get("quantization")
    told = told if isinstance(told, Mapping) else {}
    rule = asked or told.get("weight_scale_rule") or told.get("scale_rule") or RULE
    if rule not in RULE_LIMITS:
        raise LongtakeError(
            "unknown rule of block scales", got=rule, expected=", ".join(RULE_LIMITS), fix="pass --packed-rule"
        )
    return str(rule)


def _shape(name: str, state: Mapping[str, Tensor]) -> tuple[int, int]:
    missing = [part for part in (SCALES, AMAX) if f"{name}.{part}" not in state]
    if missing:
        what, expected = f"packed linear {name} is not whole", f"{VALUES}, {SCALES}, {AMAX}"
        raise IntegrityError(what, got=f"no {', '.join(missing)}", expected=expected, fix="get the file again")
    values, scales = state[f"{name}.{VALUES}"], state[f"{name}.{SCALES}"]
    rows, columns, padded_rows, padded_columns = _metadata(name, state)
    wanted = {"values": padded_rows * padded_columns // 2, "scales": padded_rows * padded_columns // BLOCK, "amax": 1}
    got = {"values": values.numel(), "scales": scales.numel(), "amax": state[f"{name}.{AMAX}"].numel()}
    fits = got == wanted and 0 < rows <= padded_rows and 0 < columns <= padded_columns and columns % BLOCK == 0
    if not fits or values.element_size() != 1 or scales.element_size() != 1:
        raise IntegrityError(
            f"packed linear {name} doesn't fit itself",
            expected=f"uint8 and E4M3 of a {rows} x {columns} weight: {wanted}",
            got=f"{got} of {values.dtype} and {scales.dtype}",
            fix="get the file again; scales in bf16 were rounded by a cast of the whole model and can't be used",
        )
    return rows, columns


def _metadata(name: str, state: Mapping[str, Tensor]) -> list[int]:
    """Rows, columns, padded rows, padded columns; without the entry, of a weight that needs no padding."""
    entry = state.get(f"{name}.{METADATA}")
    if entry is not None and entry.numel() == 4:
        return [int(n) for n in entry.reshape(-1)]
    values = state[f"{name}.{VALUES}"]
    rows, columns = values.shape[0], 2 * values.numel() // max(1, values.shape[0])
    return [rows, columns, rows, columns]
