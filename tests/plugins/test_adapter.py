"""The generic TensorRT plugin: parsed and built on a machine without a GPU, its enqueue called by hand."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from longtake.engines.flavour import flavour_for
from longtake.plugins.adapter import DIGEST_FIELD, plugin_from_op, register_plugins
from longtake.plugins.cases import SIZES, op_inputs, sizes_for
from longtake.plugins.kernels import dims_from_shapes, kernels_of, shape_of, size_of
from longtake.plugins.nvrtc import source_digest
from longtake.plugins.ops import REFERENCES
from longtake.plugins.spec import DOMAIN, KERNEL_OPS, PLUGIN_NAMESPACE, PLUGIN_VERSION
from longtake.runtime.errors import IntegrityError, LongtakeError, UnavailableError

ONNX_TYPES = {
    "compute": TensorProto.BFLOAT16, "int8": TensorProto.INT8, "int32": TensorProto.INT32, "fp32": TensorProto.FLOAT,
    "fp8": TensorProto.FLOAT8E4M3FN,
}  # fmt: skip


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


def model_of(op: str, version: str = PLUGIN_VERSION, compute: int = TensorProto.BFLOAT16) -> onnx.ModelProto:
    """An ONNX file with one node, the op; the table's length is dynamic."""
    spec, dims = KERNEL_OPS[op], sizes_for(op)[0]
    types = {**ONNX_TYPES, "compute": compute}
    inputs, outputs = (
        [
            helper.make_tensor_value_info(
                t.name + suffix, types[t.dtype], [e if e == "W" else size_of(e, dims) for e in t.shape]
            )
            for t in tensors
        ]
        for tensors, suffix in ((spec.inputs, ""), (spec.outputs, "_out"))
    )
    node = helper.make_node(
        op, [i.name for i in inputs], [o.name for o in outputs],
        domain=DOMAIN, plugin_namespace=PLUGIN_NAMESPACE, plugin_version=version,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph([node], op, inputs, outputs), opset_imports=opsets, ir_version=10)


def parse(trt: Any, model: onnx.ModelProto) -> tuple[Any, Any, bool]:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    return builder, network, parser.parse(model.SerializeToString())


def build(trt: Any, op: str, target: str, compute: int = TensorProto.BFLOAT16) -> bytes:
    builder, network, parsed = parse(trt, model_of(op, compute=compute))
    assert parsed
    assert [network.get_layer(i).type for i in range(network.num_layers)] == [trt.LayerType.PLUGIN_V3]
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target}"), 0)
    if "sink_attention" in op:
        profile = builder.create_optimization_profile()
        profile.set_shape("table", (1,), (4,), (4,))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return bytes(plan)


@pytest.mark.parametrize("target", ("89", "120"))
@pytest.mark.parametrize("op", KERNEL_OPS)
def test_an_engine_with_the_plugin_builds_without_a_gpu(trt: Any, op: str, target: str) -> None:
    plan = build(trt, op, target)
    assert op.encode() in plan
    assert source_digest(kernels_of(op).source).encode() in plan, "the kernel's digest is serialized with the plugin"


def test_fp32_activations_build_too(trt: Any) -> None:
    assert build(trt, "sink_attention_nvfp4", "89", TensorProto.FLOAT)


def test_another_plugin_version_is_not_parsed(trt: Any) -> None:
    _, network, parsed = parse(trt, model_of("sink_attention_bf16", version="2"))
    assert not parsed or network.num_layers == 0


def test_registering_twice_registers_once(trt: Any) -> None:
    assert register_plugins(trt) is register_plugins(trt)
    mine = [c.name for c in trt.get_plugin_registry().all_creators if c.name in KERNEL_OPS]
    assert sorted(mine) == sorted(KERNEL_OPS)


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
    spec = KERNEL_OPS[op]
    aliases = dict(spec.aliases)
    dims = dims_from_shapes(spec, [t.shape for t in inputs])
    compute = torch.bfloat16 if op == "nvfp4_dequantize" else inputs[0].dtype
    outputs = tuple(
        inputs[aliases[i]]
        if i in aliases
        else torch.full(shape_of(t, dims), float("nan"), device=inputs[0].device).to(
            torch.float8_e4m3fn if t.dtype == "fp8" else compute
        )
        for i, t in enumerate(spec.outputs)
    )
    described = [[descriptor(api, t) for t in tensors] for tensors in (inputs, outputs)]
    workspace = torch.full((1 << 16,), 0x7F, dtype=torch.uint8, device=inputs[0].device)
    plugin.on_shape_change(*described)
    before = {i: inputs[i].clone() for i in aliases.values()}
    for _ in range(2):  # the second time with the launcher kept from the first
        for i, tensor in before.items():
            inputs[i].copy_(tensor)
        plugin.enqueue(
            *described, [t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs], workspace.data_ptr(), stream
        )
    return outputs


CASES = [(op, dtype) for op in KERNEL_OPS for dtype in ("bf16", "fp32") if (op, dtype) != ("nvfp4_dequantize", "fp32")]


def check_enqueue(api: Any, op: str, dtype: str, device: str, stream: int) -> None:
    dims = SIZES[2] if sizes_for(op) is SIZES else sizes_for(op)[1]
    for indices in ((2,), (-1,), *(((3, -1, 0),) if "sink" in op else ())):
        inputs = op_inputs(op, dims, dtype, indices)
        wanted = REFERENCES[op](*inputs)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for g, w in zip(enqueue(api, op, tuple(t.to(device) for t in inputs), stream), wanted):
            limits = {"sink": (1e-2, 1e-5), "qk_n": (1e-3, 1e-6), "norm": (1e-3, 1e-6), "gate": (1e-3, 1e-6),
                      "resi": (1e-3, 1e-6), "rms_": (1e-3, 1e-6)}.get(op[:4], (0.0, 0.0))  # fmt: skip
            limits = (4e-3, 4e-3) if w.dtype == torch.float8_e4m3fn else limits
            tolerance = limits[dtype == "fp32"]
            assert g.dtype == w.dtype
            assert (g.cpu().double() - w.double()).norm() <= tolerance * w.double().norm(), indices


@pytest.mark.parametrize("op", KERNEL_OPS)
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
