"""Convolutions with bias of a stream's frames, channels last: the frame is padded, time is not (the history is in x)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from longtake.machine.capability import conv_methods
from longtake.plugins.conv.reference import conv_1x1x1, conv_1x3x3, conv_3x1x1, conv_3x3x3, conv_3x3x3_add
from longtake.plugins.kernels import Dims
from longtake.plugins.spec import Library, Op, OpSpec, TensorSpec

SIZES: tuple[dict[str, int], ...] = (
    {"T": 6, "Y": 12, "X": 20, "C": 64, "N": 32},
    {"T": 3, "Y": 7, "X": 5, "C": 48, "N": 128},
    {"T": 4, "Y": 1, "X": 9, "C": 16, "N": 16},
)


def _spec(name: str, kernel: tuple[int, int, int], add: bool) -> OpSpec:
    """`add`: a residual is added before the one rounding. The weight's shape is as in PyTorch; in memory a library may
    have it with its channels last."""
    shape = (f"T-{kernel[0] - 1}" if kernel[0] > 1 else "T", "Y", "X", "N")
    inputs = (
        TensorSpec("x", "compute", ("T", "Y", "X", "C")),
        TensorSpec("weight", "compute", ("N", "C", *map(str, kernel)), channels_last=True),
        TensorSpec("bias", "compute", ("N",)),
        *((TensorSpec("residual", "compute", shape),) if add else ()),
    )
    return OpSpec(name, inputs, outputs=(TensorSpec("out", "compute", shape),))


def _launchers() -> Mapping[str, Callable[..., Any]]:
    from longtake.plugins.conv.library import LAUNCHERS

    return LAUNCHERS


def _methods(product: bool, compute_capability: str, dims: Dims, attention: str) -> Sequence[str]:
    methods = conv_methods(compute_capability)
    return ["cublaslt", *methods] if product and methods else methods


def _op(reference: Callable[..., Any], kernel: tuple[int, int, int], add: bool = False) -> Op:
    product = kernel == (1, 1, 1)  # over all positions
    methods = ("cublaslt", "cudnn", "torch") if product else ("cudnn", "torch")
    return Op(
        _spec(reference.__name__, kernel, add),
        reference,
        ways=tuple(Library(method, _launchers) for method in methods),
        sizes=SIZES,
        methods=partial(_methods, product),
        otherwise="set vae_ops: engine in the recipe",
        splits_by_frame=kernel == (3, 3, 3) and not add,
        in_codes="conv_1x3x3_up" if kernel == (1, 3, 3) else "",  # only ever behind an upsampling
    )


OPS = (
    _op(conv_3x3x3, (3, 3, 3)),
    _op(conv_3x3x3_add, (3, 3, 3), add=True),
    _op(conv_3x1x1, (3, 1, 1)),
    _op(conv_1x3x3, (1, 3, 3)),
    _op(conv_1x1x1, (1, 1, 1)),
)
