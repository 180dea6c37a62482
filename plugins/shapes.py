"""What the formulas of an op's shapes say: sizes from dims, dims from shapes, and the shape and dtype of what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.plugins.kernels import Dims
from longtake.plugins.spec import OpSpec, TensorSpec

MAX_HEAD_DIM = 128


def size_of(expression: str, dims: Mapping[str, Any]) -> Any:
    """The value of a dimension of a TensorSpec: a number, a letter, a sum, a difference, a product, or one of these divided
    by a number."""
    if "+" in expression:
        return sum(size_of(term, dims) for term in expression.split("+"))
    if "-" in expression:
        first, _, rest = expression.partition("-")
        return size_of(first, dims) - size_of(rest, dims)
    product, _, divisor = expression.partition("/")
    size = math.prod(int(f) if f.isdigit() else dims[f] for f in product.split("*"))
    return size // int(divisor) if divisor else size


def shape_of(tensor: TensorSpec, dims: Dims) -> tuple[int, ...]:
    """The shape of a tensor for given dims."""
    return tuple(size_of(expression, dims) for expression in tensor.shape)


def infer_shape(spec: OpSpec, output: int, shapes: Sequence[Sequence[Any] | None]) -> tuple[Any, ...]:
    """The shape of an output, from those of the inputs.

    Sizes are numbers (or torch's symbols for such), or names of dynamic dimensions; what is not known is None, of an
    input's shape as of the result.
    """
    known: dict[str, Any] = {}
    for tensor, shape in zip(spec.inputs, shapes):
        for formula, size in zip(tensor.shape, shape or ()):
            if size is not None:
                known.setdefault(formula, size)
    for formula, size in list(known.items()):
        letter, _, divisor = formula.partition("/")
        if divisor and letter.isalpha() and not isinstance(size, str):
            known.setdefault(letter, size * int(divisor))
    return tuple(
        known[formula] if formula in known else _computed(formula, known) for formula in spec.outputs[output].shape
    )


def _computed(formula: str, known: Mapping[str, Any]) -> Any:
    numbers = {letter: size for letter, size in known.items() if not isinstance(size, str)}
    try:
        return size_of(formula, numbers)
    except KeyError:
        return None


def infer_dtype(spec: OpSpec, output: int, dtypes: Sequence[str]) -> str:
    """The dtype of an output that is written over no input, from those of the inputs: activations come out as they
    went in, or as bf16 where none did."""
    kind = spec.outputs[output].dtype
    if kind != "compute":
        return kind
    return next((dtype for dtype, tensor in zip(dtypes, spec.inputs) if tensor.dtype == "compute"), "bf16")


def dims_from_shapes(spec: OpSpec, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The dims that give the op's inputs these shapes.

    Raises:
        LongtakeError: a rank is wrong, the shapes contradict each other, or a size does not suit the kernels.
    """
    if len(shapes) != len(spec.inputs):
        raise LongtakeError(f"{spec.name}: wrong number of inputs", got=len(shapes), expected=len(spec.inputs))
    dims: dict[str, int] = {}
    for tensor, shape in zip(spec.inputs, shapes):
        for expression, size in zip(tensor.shape, shape):
            letter, _, divisor = expression.partition("/")
            if letter.isalpha():
                dims.setdefault(letter, size * int(divisor or 1))
    for tensor, shape in zip(spec.inputs, shapes):  # now: a formula may stand before its letter
        if len(shape) != len(tensor.shape) or tuple(shape) != shape_of(tensor, dims):
            known = ", ".join(f"{name}={size}" for name, size in dims.items())
            raise LongtakeError(
                f"{spec.name}: {tensor.name} has the wrong shape",
                got=list(shape),
                expected=f"[{', '.join(tensor.shape)}] with {known}",
            )
    _check_dims(spec, dims)
    return dims


def _check_dims(spec: OpSpec, dims: Dims) -> None:
    for letter, size in dims.items():
        if size < 1:
            raise LongtakeError(f"{spec.name}: empty dimension", got=f"{letter}={size}", expected="at least 1")
    if spec.check:
        spec.check(dims)
    inner = next(letter for letter in "DCK" if letter in dims)
    if dims[inner] % spec.multiple or dims.get("D", 16) > MAX_HEAD_DIM:
        raise LongtakeError(
            f"{spec.name}: the kernels do not take {inner}={dims[inner]}",
            expected=f"a multiple of {spec.multiple}" + (f", at most {MAX_HEAD_DIM}" if inner == "D" else ""),
        )


def torch_dtype(tensor: TensorSpec, compute: str = "bf16") -> torch.dtype:
    """The dtype of a tensor in torch where activations are `compute`."""
    return DTYPES[compute if tensor.dtype == "compute" else tensor.dtype].torch
