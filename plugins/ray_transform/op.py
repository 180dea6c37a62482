"""Into ray coordinates and back: one launch each, a thread block a token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.kernels import WARP, Call, Dims, Kernel, Macros, blocks_of
from longtake.plugins.ray_transform.reference import (
    CLIP_EPS,
    QK_EPS,
    SMALLEST,
    ray_prepare_gdn,
    ray_prepare_softmax,
    ray_restore,
)
from longtake.plugins.spec import Op, OpSpec, TensorSpec

MOST_THREADS = 256
HEADS = ("T", "P", "H", "D")
SIZES: tuple[dict[str, int], ...] = (
    {"T": 3, "P": 64, "H": 3, "D": 48},
    {"T": 1, "P": 2, "H": 20, "D": 112},
    {"T": 2, "P": 5, "H": 2, "D": 16},
    {"T": 1, "P": 1, "H": 1, "D": 8},
)
TOLERANCE = {"bf16": 2e-3, "fp32": 1e-5}


def heads(name: str) -> TensorSpec:
    """A chunk's queries, keys or values."""
    return TensorSpec(name, "compute", HEADS)


ROPE = tuple(TensorSpec(f"rope_{f}", "fp32", ("T", "P", "D/4")) for f in ("cos", "sin"))
RAYS = TensorSpec("rays", "fp32", ("T", "P", "4", "4"))


def _check(dims: Dims) -> None:
    if dims["D"] % 8:
        raise LongtakeError("half of a head is no groups of 4", got=f"D={dims['D']}", expected="a multiple of 8")


def _prepare(name: str, delta: bool) -> OpSpec:
    weights = (TensorSpec(f"{x}_weight", "compute", ("H*D",)) for x in "qk")
    outputs = tuple(heads(f"{x}_out") for x in "qkv")
    growth = (TensorSpec("growth", "fp32", ("T", "P", "H")),) * delta
    inverse = TensorSpec("inverse", "fp32", ("T", "P", "4", "4"))
    inputs = (*map(heads, "qkv"), *weights, RAYS, inverse, *ROPE)
    return OpSpec(name, inputs, (*outputs, *growth), check=_check, multiple=8)


RESTORE = OpSpec("ray_restore", (heads("x"), RAYS, *ROPE), (heads("out"),), check=_check, multiple=8)


def _threads(dims: Dims) -> int:
    return min(MOST_THREADS, WARP * blocks_of(dims["H"] * dims["D"] // 4, WARP))


def _macros(prepare: bool, delta: bool, clip: bool, dims: Dims) -> Macros:
    sizes = {"HEADS": dims["H"], "HEAD_DIM": dims["D"], "THREADS": _threads(dims)}
    if not prepare:
        return {**sizes, "PREPARE": 0}
    scale = (dims["P"] * dims["D"]) ** -0.5
    numbers = {"EPS": QK_EPS, "CLIP_EPS": CLIP_EPS, "SMALLEST": SMALLEST, "KEY_SCALE": scale}
    units = blocks_of(dims["H"] * dims["D"] // 4, _threads(dims))
    flags = {"PREPARE": 1, "DELTA": int(delta), "CLIP": int(clip), "UNITS_EACH": units}
    return {**sizes, **flags, **{name: f"{value!r}f" for name, value in numbers.items()}}


def _calls(function: str, spec: OpSpec, dims: Dims) -> tuple[Call, ...]:
    return (Call(function, (dims["T"] * dims["P"], 1), _threads(dims), spec.names),)


def plausible(spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator) -> Mapping[str, Tensor]:
    """Rigid motions, and angles."""
    shape = (dims["T"], dims["P"])
    turn, _ = torch.linalg.qr(torch.randn(*shape, 3, 3, generator=generator))
    place = torch.randn(*shape, 3, 1, generator=generator)
    last = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(*shape, 1, 4)
    rays = torch.cat((torch.cat((turn, place), -1), last), -2)
    inverse = torch.cat((torch.cat((turn.mT, -turn.mT @ place), -1), last), -2)
    angles = torch.randn(*shape, dims["D"] // 4, generator=generator)
    return {"rays": rays, "inverse": inverse, "rope_cos": angles.cos(), "rope_sin": angles.sin()}


def _op(name: str, reference: Any, delta: bool, clip: bool) -> Op:
    name = f"{name}_clip" if clip else name
    spec = _prepare(name, delta)

    def run(*tensors: Tensor) -> Any:
        return reference(*tensors, clip)

    kernel = Kernel(
        Path(__file__).with_name("kernel.cu"),
        partial(_macros, True, delta, clip),
        partial(_calls, "ray_prepare", spec),
    )
    return Op(spec, run, (kernel,), SIZES, plausible, tolerance=TOLERANCE)


OPS = (
    *(_op("ray_prepare_gdn", ray_prepare_gdn, True, clip) for clip in (False, True)),
    *(_op("ray_prepare_softmax", ray_prepare_softmax, False, clip) for clip in (False, True)),
    Op(
        RESTORE,
        ray_restore,
        (
            Kernel(
                Path(__file__).with_name("kernel.cu"),
                partial(_macros, False, False, False),
                partial(_calls, "ray_restore", RESTORE),
            ),
        ),
        SIZES,
        plausible,
        tolerance=TOLERANCE,
    ),
)
