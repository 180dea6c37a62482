"""Ops whose input may lie in the end of their output: to the last bit what they give apart, in every order of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.plugins.cases import op_inputs
from longtake.plugins.registry import kernel_ops, op_named
from longtake.plugins.run import run_kernel
from longtake.plugins.shapes import dims_from_shapes, shape_of

LARGE = {"T": 4, "Y": 44, "X": 80, "C": 512, "F": 2}, {"T": 2, "Y": 44, "X": 80, "C": 512, "N": 256}
STREAM_OPS, DUPLICATE_OPS = ("norm_silu_extend", "stream_extend"), ("duplicate_up", "duplicate_up_time")
CASES = [(op, dims) for op in (*STREAM_OPS, *DUPLICATE_OPS) for dims in op_named(op).sizes]
ON_GPU = [*CASES, *((op, LARGE[0]) for op in STREAM_OPS), *((op, LARGE[1]) for op in DUPLICATE_OPS)]
dtypes = pytest.mark.parametrize("dtype", ("bf16", "fp32"))


def ids(value: Any) -> str:
    return value if isinstance(value, str) else "x".join(map(str, value.values()))


def in_output(op: str, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The inputs, the one that may share memory lying in the end of the output that comes with them."""
    spec = op_named(op).spec
    ((output, source),) = spec.may_share
    dims = dims_from_shapes(spec, [t.shape for t in inputs])
    out = torch.full(shape_of(spec.outputs[output], dims), float("nan"), dtype=inputs[0].dtype, device=inputs[0].device)
    end = out.flatten()[-inputs[source].numel() :].view(inputs[source].shape)
    end.copy_(inputs[source])
    return [end if i == source else t.clone() for i, t in enumerate(inputs)], out


def test_only_these_ops_do() -> None:
    assert {name for name, op in kernel_ops().items() if op.spec.may_share} == {*STREAM_OPS, *DUPLICATE_OPS}


@pytest.mark.parametrize("op, dims", CASES, ids=ids)
@dtypes
@pytest.mark.parametrize("reverse", (False, True))
def test_the_kernels_text_may_write_over_its_input(
    host_device: Any, op: str, dims: dict[str, int], dtype: str, reverse: bool
) -> None:
    host_device.reverse = reverse
    inputs = list(op_inputs(op, dims, dtype))
    wanted = host_device.run(op, *(t.clone() for t in inputs))
    given, out = in_output(op, inputs)
    got = host_device.run(op, *given, out=out)
    assert got[0] is out and all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("op, dims", ON_GPU, ids=ids)
@dtypes
def test_the_kernel_may_write_over_its_input(op: str, dims: dict[str, int], dtype: str) -> None:
    inputs = [t.cuda() for t in op_inputs(op, dims, dtype)]
    wanted = run_kernel(op, *(t.clone() for t in inputs))
    for _ in range(5):  # a race shows seldom
        given, out = in_output(op, inputs)
        got = run_kernel(op, *given, out=out)
        pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
        assert all(torch.equal(g, w) for g, w in pairs)
