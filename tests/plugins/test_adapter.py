"""The generic TensorRT plugin: parsed and built on a machine without a GPU, its enqueue called by hand."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.machine.flavour import flavour_for
from longtake.plugins.adapter import DIGEST_FIELD, _plugin_class, register_plugins
from longtake.plugins.cache_format import SIZES
from longtake.plugins.cases import op_inputs
from longtake.plugins.registry import kernel_of, kernel_ops, op_named
from longtake.plugins.shapes import dims_from_shapes, shape_of, torch_dtype

sys.path.insert(0, str(Path(__file__).parent))
from plugin_builds import BUILDS, OTHER_VERSION  # noqa: E402


def plugin_from_op(trt: Any, name: str) -> Any:
    """The IPluginV3 of an op."""
    return _plugin_class(trt)(trt, op_named(name))


@pytest.fixture(scope="module")
def trt() -> Any:
    """A flavour that takes plugins from Python, with its parser able to find its library."""
    try:
        module = flavour_for(None).module
    except UnavailableError as reason:
        pytest.skip(str(reason))
    if not hasattr(module, "IPluginV3OneBuildV2"):
        pytest.skip(f"{module.__name__} {module.__version__} takes no plugins from Python")
    register_plugins(module)
    return module


@pytest.fixture(scope="module")
def built(trt: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What plugin_builds.py found, by build. A build may bring its process down once: see there."""
    out = tmp_path_factory.mktemp("builds") / "found.jsonl"
    out.touch()
    found: dict[str, dict[str, Any]] = {}
    for _ in range(3):
        left = [name for name in (*BUILDS, OTHER_VERSION) if name not in found]
        script = [sys.executable, str(Path(__file__).with_name("plugin_builds.py")), str(out), *left]
        done = subprocess.run(script, capture_output=True, text=True, timeout=300) if left else None
        found = {row["build"]: row for row in map(json.loads, out.read_text().splitlines())}
        if done is None or done.returncode >= 0:  # a negative one is a signal
            assert done is None or done.returncode == 0, done.stderr
            break
    return found


@pytest.mark.parametrize("build", BUILDS)
def test_an_engine_with_the_plugin_builds_without_a_gpu(built: dict[str, dict[str, Any]], build: str) -> None:
    assert built[build]["named"]
    assert built[build]["digest"], "the kernel's digest is serialized with the plugin"


def test_another_plugin_version_is_not_parsed(built: dict[str, dict[str, Any]]) -> None:
    assert not built[OTHER_VERSION]["taken"]


@pytest.mark.parametrize("build", BUILDS)
def test_a_built_layer_says_which_op_it_is(built: dict[str, dict[str, Any]], build: str) -> None:
    """Whatever its node is named."""
    assert built[build]["layer"] == build.split("-")[0]


def test_some_ops_have_as_many_inputs_and_outputs() -> None:
    """So the numbers alone would not tell a layer's op."""
    alike = ("kv_cache_write_bf16", "norm_modulate_fp8", "gelu_quantize_fp8")
    assert {(len(op_named(op).spec.inputs), len(op_named(op).spec.outputs)) for op in alike} == {(4, 1)}


def test_registering_twice_registers_once(trt: Any) -> None:
    assert register_plugins(trt) is register_plugins(trt)
    mine = [c.name for c in trt.get_plugin_registry().all_creators if c.name in kernel_ops()]
    assert sorted(mine) == sorted(kernel_ops())


def test_a_serialized_plugin_with_another_kernel_is_refused(trt: Any) -> None:
    creator = register_plugins(trt)["kv_cache_write_nvfp4"]
    own = plugin_from_op(trt, "kv_cache_write_nvfp4").get_fields_to_serialize()
    restored = creator.create_plugin("x", own, trt.TensorRTPhase.RUNTIME)
    assert restored.plugin_name == "kv_cache_write_nvfp4"
    other = trt.PluginFieldCollection([trt.PluginField(DIGEST_FIELD, b"0" * 64, trt.PluginFieldType.CHAR)])
    for fields in (other, trt.PluginFieldCollection([])):
        with pytest.raises(
            IntegrityError, match=r"another version of plugin kv_cache_write_nvfp4(.|\n)*build the engines"
        ):
            creator.create_plugin("x", fields, trt.TensorRTPhase.RUNTIME)


def test_a_flavour_without_python_plugins_is_an_error() -> None:
    old = ModuleType("old")
    old.__dict__["__version__"] = "1.6"
    with pytest.raises(UnavailableError, match=r"old 1\.6 takes no plugins from Python(.|\n)*segmented"):
        register_plugins(old)


@pytest.fixture(params=("installed", "stand-in"))
def api(request: pytest.FixtureRequest) -> Any:
    """The installed flavour's classes (importing them needs no GPU that it accepts), and a stand-in."""
    if request.param == "stand-in":
        return STAND_IN
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            continue
        if hasattr(module, "IPluginV3OneBuildV2"):
            return module
    pytest.skip("no TensorRT flavour with Python plugin classes is installed")


class StandIn(ModuleType):
    """As much of the TensorRT module as enqueue needs, for machines whose flavour has no plugin classes."""

    class IPluginV3: ...

    class IPluginV3OneCore: ...

    class IPluginV3OneBuildV2: ...

    class IPluginV3OneRuntime: ...

    class PluginTensorDesc: ...

    DataType = SimpleNamespace(BF16="BF16", FLOAT="FLOAT", INT8="INT8", INT32="INT32", FP8="FP8")
    TensorFormat = SimpleNamespace(LINEAR="LINEAR")


STAND_IN = StandIn("stand_in")


def descriptor(api: Any, tensor: Tensor) -> Any:
    names = {
        torch.bfloat16: "BF16",
        torch.float32: "FLOAT",
        torch.int8: "INT8",
        torch.int32: "INT32",
        torch.float8_e4m3fn: "FP8",
    }
    made = api.PluginTensorDesc()
    made.dims, made.type, made.format = (
        tuple(tensor.shape),
        getattr(api.DataType, names[tensor.dtype]),
        api.TensorFormat.LINEAR,
    )
    return made


def enqueue(api: Any, op: str, inputs: tuple[Tensor, ...], stream: int) -> tuple[Tensor, ...]:
    """The plugin's enqueue as TensorRT calls it: descriptors, addresses, workspace, stream."""
    plugin = plugin_from_op(api, op).attach_to_context(None)
    spec = op_named(op).spec
    aliases = dict(spec.aliases)
    dims = dims_from_shapes(spec, [t.shape for t in inputs])
    compute = "fp32" if inputs[0].dtype == torch.float32 and len(op_named(op).compute_dtypes) > 1 else "bf16"
    outputs = tuple(
        inputs[aliases[i]]
        if i in aliases
        else torch.full(shape_of(t, dims), float("nan"), device=inputs[0].device).to(
            torch.float8_e4m3fn if t.dtype == "fp8" else torch_dtype(t, compute)
        )
        for i, t in enumerate(spec.outputs)
    )
    described = [[descriptor(api, t) for t in tensors] for tensors in (inputs, outputs)]
    needed = kernel_of(op).workspace_bytes(dims)
    workspace = torch.full((max(needed, 1),), 0x7F, dtype=torch.uint8, device=inputs[0].device)
    plugin.on_shape_change(*described)
    before = {i: inputs[i].clone() for i in aliases.values()}
    for _ in range(2):  # the second time with the launcher kept from the first
        for i, tensor in before.items():
            inputs[i].copy_(tensor)
        plugin.enqueue(
            *described, [t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs], workspace.data_ptr(), stream
        )
    return outputs


CASES = [(name, dtype) for name, op in kernel_ops().items() for dtype in op.compute_dtypes]


def check_enqueue(api: Any, op: str, dtype: str, device: str, stream: int) -> None:
    dims = op_named(op).sizes[2 if op_named(op).sizes is SIZES else 1]
    last = min(3, dims.get("S", 4) - 1)
    for indices in ((2,), (-1,), *(((last, -1, 0),) if op_named(op).reads_table else ())):
        inputs = op_inputs(op, dims, dtype, indices)
        wanted = op_named(op).reference(*inputs)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for g, w in zip(enqueue(api, op, tuple(t.to(device) for t in inputs), stream), wanted):
            tolerance = op_named(op).tolerance.get(dtype, 0.0)
            assert g.dtype == w.dtype
            assert (g.cpu().double() - w.double()).norm() <= tolerance * w.double().norm(), indices


@pytest.mark.parametrize("op", kernel_ops())
def test_enqueue_equals_the_reference_on_the_host(api: Any, host_device: Any, op: str) -> None:
    check_enqueue(api, op, "bf16", "cpu", stream=77)
    assert {stream for stream, _ in host_device.launches} == {77}, "everything goes to TensorRT's stream"


@pytest.mark.gpu
@pytest.mark.parametrize("op, dtype", CASES)
def test_enqueue_equals_the_reference(api: Any, op: str, dtype: str) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        check_enqueue(api, op, dtype, "cuda", stream.cuda_stream)


def test_enqueue_refuses_a_cache_that_is_not_in_place(api: Any, host_device: Any) -> None:
    inputs = op_inputs("kv_cache_write_bf16", SIZES[2], "bf16", (1,))
    plugin = plugin_from_op(api, "kv_cache_write_bf16")
    copy = inputs[2].clone()
    described = [descriptor(api, t) for t in inputs], [descriptor(api, copy)]
    with pytest.raises(LongtakeError, match=r"cache must be written in place(.|\n)*ALIASED_PLUGIN_IO_10_03"):
        plugin.enqueue(*described, [t.data_ptr() for t in inputs], [copy.data_ptr()], 0, 0)
    assert not host_device.launches
