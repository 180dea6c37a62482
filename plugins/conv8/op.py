"""Convolutions of 8-bit codes with one scale a channel, bias and perhaps residual: our kernel on Hopper, a library elsewhere.

conv_1x3x3_up is an upsampling and the 1x3x3 convolution behind it in one, folded (see reference.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longtake.machine.capability import conv8_methods
from longtake.plugins.codes import CODES, encode
from longtake.plugins.conv8.reference import FOLDED, conv8
from longtake.plugins.kernels import Dims
from longtake.plugins.shapes import shape_of
from longtake.plugins.spec import Library, Op, OpSpec, TensorSpec

METHODS = ("wgmma", "wgmma_rows", "torch")
KERNELS = {"3x3x3": (3, 3, 3), "3x3x3_add": (3, 3, 3), "3x1x1": (3, 1, 1), "1x3x3_up": FOLDED}
SIZES: tuple[dict[str, int], ...] = (
    {"T": 4, "Y": 12, "X": 20, "C": 128, "N": 128},
    {"T": 3, "Y": 7, "X": 5, "C": 48, "N": 32},
    {"T": 3, "Y": 9, "X": 35, "C": 144, "N": 136},
)


def _spec(name: str, codes: str) -> OpSpec:
    kernel = KERNELS[name]
    rows = "4*N" if kernel == FOLDED else "N"  # of weights
    frame = ("2*Y", "2*X") if kernel == FOLDED else ("Y", "X")
    shape = (f"T-{kernel[0] - 1}" if kernel[0] > 1 else "T", *frame, "N")
    residual = (TensorSpec("residual", "compute", shape),) if name.endswith("add") else ()
    inputs = (
        TensorSpec("x", "int8", ("T", "Y", "X", "C")),
        TensorSpec("weight", "int8", (rows, "C", *map(str, kernel)), channels_last=True),
        TensorSpec("scale", "fp32", (rows,)),
        TensorSpec("bias", "compute", ("N",)),
        *residual,
    )
    return OpSpec(f"conv_{name}_{codes}", inputs, outputs=(TensorSpec("out", "compute", shape),))


def coded_inputs(codes: str, spec: OpSpec, dims: Dims, compute: torch.dtype, generator: Any) -> Mapping[str, Tensor]:
    """Codes of normal numbers, and scales that bring the sums back to about 1."""
    spread = {"fp8": 40.0, "int8": 30.0}[codes]
    x, weight, scale = spec.inputs[:3]
    tensors = {t.name: encode(spread * torch.randn(shape_of(t, dims), generator=generator), codes) for t in (x, weight)}
    summands = tensors["weight"][0].numel()
    even = torch.rand(shape_of(scale, dims), generator=generator) + 0.5
    return {**tensors, "scale": even / (spread**2 * summands**0.5)}


def _launchers() -> Mapping[str, Callable[..., Any]]:
    from longtake.plugins.conv8.library import LAUNCHERS

    return LAUNCHERS


def _methods(compute_capability: str, dims: Dims, attention: str) -> Sequence[str]:
    return conv8_methods(compute_capability)


def _op(name: str, codes: str) -> Op:
    return Op(
        _spec(name, codes),
        partial(conv8, codes=codes),
        ways=tuple(Library(method, _launchers) for method in METHODS),
        sizes=SIZES,
        inputs=partial(coded_inputs, codes),
        methods=_methods,
        otherwise="set vae_conv: bf16 in the recipe",
        splits_by_frame=name == "3x3x3",
        codes=codes,
    )


OPS = tuple(_op(name, codes) for codes in CODES for name in KERNELS)
