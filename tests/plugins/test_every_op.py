"""What must hold of every op, whatever it computes: an op that is new is checked here without a line of its own."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.dtypes import of_torch
from longtake.errors import LongtakeError
from longtake.plugins import registry
from longtake.plugins.cases import op_inputs
from longtake.plugins.codes import CODES
from longtake.plugins.kernels import TABLE_LENGTH, WORKSPACE
from longtake.plugins.nvrtc import INCLUDE
from longtake.plugins.ops import torch_op, torch_schema
from longtake.plugins.registry import all_ops, kernel_ops, op_named
from longtake.plugins.run import run_kernel
from longtake.plugins.shapes import dims_from_shapes, infer_dtype, infer_shape, shape_of, torch_dtype
from longtake.plugins.spec import Op

ROOT = Path(__file__).resolve().parents[2]
NAMES = frozenset(all_ops())
every_op = pytest.mark.parametrize("name", all_ops())
every_kernel = pytest.mark.parametrize("name", kernel_ops())


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def odd_case(op: Op, dtype: str) -> tuple[dict[str, int], tuple[Tensor, ...]]:
    """A small size, and inputs of it."""
    dims = op.sizes[-2 if len(op.sizes) > 2 else -1]
    return dims, op_inputs(op.name, dims, dtype, op.indices[0])


@every_op
def test_sizes_are_those_of_the_inputs(name: str) -> None:
    op = op_named(name)
    for dims in op.sizes:
        inputs = op_inputs(name, dims, "fp32", op.indices[0])
        found = dims_from_shapes(op.spec, [t.shape for t in inputs])
        assert found.items() <= {**dims, "W": len(op.indices[0])}.items()
        assert [t.dtype for t in inputs] == [torch_dtype(t, "fp32") for t in op.spec.inputs]


@every_op
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_the_reference_gives_what_the_spec_says(name: str, dtype: str) -> None:
    op = op_named(name)
    dims, inputs = odd_case(op, dtype)
    shapes, dtypes = [t.shape for t in inputs], [of_torch(t.dtype).name for t in inputs]
    for i, out in enumerate(as_tuple(op.reference(*inputs))):
        assert tuple(out.shape) == infer_shape(op.spec, i, shapes) == shape_of(op.spec.outputs[i], dims)
        assert of_torch(out.dtype).name == infer_dtype(op.spec, i, dtypes) and out.is_contiguous()


def test_a_size_that_is_not_known_leaves_what_it_decides_unknown() -> None:
    spec = op_named("duplicate_up_time").spec
    assert infer_shape(spec, 0, [(2, 3, 5, 64), None]) == (4, 6, 10, None)
    assert infer_shape(spec, 0, [("T", 3, 5, 64), (None, 6, 10, 32)]) == (None, 6, 10, 32)
    assert infer_shape(op_named("nvfp4_dequantize").spec, 0, [("N", 24), None]) == ("N", 48)


@every_op
def test_the_operator_is_the_reference(name: str) -> None:
    op = op_named(name)
    assert str(torch_op(name)._schema) == f"longtake::{name}{torch_schema(op.spec)}"
    eight_bits = any(t.dtype == "fp8" for t in op.spec.tensors)  # which torch can't compare
    checks = ("test_faketensor",) if eight_bits else ("test_schema", "test_faketensor")
    torch.library.opcheck(torch_op(name), odd_case(op, "fp32")[1], test_utils=checks)


@pytest.mark.gpu
@every_op
def test_a_gpu_runs_the_operator_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or convolutions in fp32 are not
    op = op_named(name)
    inputs = odd_case(op, "fp32")[1]
    here, there = torch_op(name)(*inputs), torch_op(name)(*(t.cuda() for t in inputs))
    for ours, theirs in zip(as_tuple(here), as_tuple(there)):
        exact = op.runs_in == "kernel" and not op.tolerance
        step = least = 1e-4 if op.kernel_size else 1e-5  # convolutions add up hundreds of products in another order
        if ours.dtype == torch.float8_e4m3fn:
            step, least = 2**-3, 0.02
        pair = theirs.cpu().float(), ours.float()
        torch.testing.assert_close(*pair, rtol=0 if exact else step, atol=0 if exact else least)


def text_of(source: Any) -> str:
    """A kernel's text with that of the headers it includes."""
    text = source.read_text()
    return text + "".join(text_of(INCLUDE / header) for header in re.findall(r'#include "([\w.]+)"', text))


@every_kernel
def test_the_kernel_takes_what_the_launch_passes(name: str) -> None:
    op = op_named(name)
    kernel, dims = registry.kernel_of(name), {"W": 2, **op.sizes[0]}
    text = text_of(kernel.source)
    for macro in kernel.macros(dims):
        assert re.search(rf"\b{macro}\b", text), f"nobody reads {macro}"
    for call in kernel.calls(dims):
        assert re.search(rf"__global__[^;]*?\b{call.function}\s*\(", text), f"no kernel {call.function}"
        known = {*op.spec.names, WORKSPACE, TABLE_LENGTH, *kernel.buffers(dims, 0)}
        assert {argument for argument in call.arguments if isinstance(argument, str)} <= known


def check_kernel(op: Op, dtype: str, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        error = (g.cpu().double() - w.double()).norm()
        assert error <= op.tolerance.get(dtype, 0.0) * w.double().norm()


@every_kernel
@pytest.mark.parametrize("reverse", (False, True))
def test_the_kernels_text_equals_the_reference(host_device: Any, name: str, reverse: bool) -> None:
    host_device.reverse = reverse
    op = op_named(name)
    inputs = odd_case(op, "bf16")[1]
    wanted = as_tuple(op.reference(*inputs))
    check_kernel(op, "bf16", host_device.run(name, *inputs), wanted)


@pytest.mark.gpu
@every_kernel
def test_the_kernel_equals_the_reference(name: str) -> None:
    op = op_named(name)
    for dims in op.sizes:
        for dtype in op.compute_dtypes:
            inputs = op_inputs(name, dims, dtype, op.indices[0])
            wanted = as_tuple(op.reference(*inputs))
            check_kernel(op, dtype, as_tuple(run_kernel(name, *(t.cuda() for t in inputs))), wanted)


def test_two_ops_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = type("folder", (), {"__name__": "twice", "OPS": (registry.conv.OPS[0],)})
    monkeypatch.setattr(registry, "FOLDERS", (*registry.FOLDERS, doubled))
    with pytest.raises(LongtakeError, match=r"two ops have one name\n  got: conv_3x3x3\n.*fix: rename that of"):
        registry.all_ops.__wrapped__()


def test_an_unknown_op_names_the_known_ones() -> None:
    with pytest.raises(LongtakeError, match=r"unknown op\n  got: attention\n  expected: kv_cache_write_nvfp4, "):
        op_named("attention")
    with pytest.raises(LongtakeError, match=r"longtake export --force, then longtake engines$"):
        op_named("attention")
    with pytest.raises(LongtakeError, match="linear_bf16 has no kernel of ours, and is no plugin"):
        registry.kernel_of("linear_bf16")


def test_properties_follow_from_the_spec() -> None:
    ops = all_ops()
    ends = ("", *(f"_{codes}" for codes in CODES))
    assert [name for name, op in ops.items() if op.extends_stream] == [
        f"{name}{end}" for end in ends for name in ("norm_silu_extend", "stream_extend")
    ]
    assert all(op.name.endswith(f"_{op.codes}") for op in ops.values() if op.codes)
    assert [name for name, op in ops.items() if op.kernel_size] == [n for n in ops if n.startswith("conv_")]
    assert ops["conv_3x1x1"].kernel_size == (3, 1, 1) and not ops["linear_bf16"].kernel_size
    assert [name for name, op in ops.items() if op.reads_table] == [
        "sink_attention_nvfp4",
        "sink_attention_bf16",
        "frame_attention",
    ]
    assert [name for name, op in ops.items() if op.unpacks_weight] == ["nvfp4_dequantize", "nvfp4_dequantize_scaled"]
    assert {op.runs_in for name, op in ops.items() if name.startswith(("linear", "conv", "cross"))} == {"library"}
    assert all(op.first_frame in ops for op in ops.values() if op.first_frame)
    assert all(op.quantized in ops for op in ops.values() if op.quantized)
    assert not replace(ops["conv_3x3x3"], ways=()).kernel


def test_only_its_folder_compares_an_ops_name() -> None:
    """Elsewhere properties say what an op is; networks and lowerings may call one by name."""
    found = []
    for stage in ("export", "engines", "runtime", "training", "longtake"):
        for path in (ROOT / stage).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = ast.walk(node) if isinstance(node, ast.Compare) else ()
                if any(isinstance(part, ast.Constant) and part.value in NAMES for part in parts):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_importing_the_registry_loads_no_library() -> None:
    """Beyond what torch loads itself."""
    script = (
        "import sys, torch; before = set(sys.modules); import longtake.plugins.registry\n"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('cuda', 'cudnn', 'tensorrt', 'tensorrt_rtx')\n"
        "       or m.endswith(('.library', '.launch', '.driver', '.nvrtc'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
