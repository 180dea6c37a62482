"""Parse and build an engine with each plugin, ahead of time: python tests/plugins/plugin_builds.py OUT [BUILD ...]

A process of its own, because TensorRT-RTX 1.7.1 now and then damages the heap of a process that parses or builds with
Python plugins (and did not in as many builds without); what dies of it later is anybody. Each finished build adds a JSON
line to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from longtake.machine.flavour import flavour_for
from longtake.plugins.adapter import op_of_layer, register_plugins
from longtake.plugins.nvrtc import source_digest
from longtake.plugins.registry import kernel_of, kernel_ops, op_named
from longtake.plugins.shapes import size_of
from longtake.plugins.spec import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION

ONNX_TYPES = {
    "compute": TensorProto.BFLOAT16, "int8": TensorProto.INT8, "int32": TensorProto.INT32, "fp32": TensorProto.FLOAT,
    "fp8": TensorProto.FLOAT8E4M3FN,
}  # fmt: skip
BUILDS = [*(f"{op}-{target}-bf16" for op in kernel_ops() for target in ("89", "120")), "sink_attention_nvfp4-89-fp32"]
OTHER_VERSION = "kv_cache_write_bf16-89-another_version"  # parsed only, and not taken


def model_of(op: str, version: str = PLUGIN_VERSION, compute: int = TensorProto.BFLOAT16) -> onnx.ModelProto:
    """An ONNX file with one node, the op; the table's length is dynamic."""
    spec, dims = op_named(op).spec, op_named(op).sizes[0]
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
    """Builder, network, and whether the parser took the file."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    return builder, network, parser.parse(model.SerializeToString())


def build(trt: Any, op: str, target: str, dtype: str) -> tuple[str, bytes]:
    """The op that the parsed layer says it is, and the plan for compute capability `target`."""
    model = model_of(op, compute=TensorProto.FLOAT if dtype == "fp32" else TensorProto.BFLOAT16)
    model.graph.node[0].name = "any/name"
    builder, network, parsed = parse(trt, model)
    assert parsed
    assert [network.get_layer(i).type for i in range(network.num_layers)] == [trt.LayerType.PLUGIN_V3]
    layer = op_of_layer(trt, network.get_layer(0))
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target}"), 0)
    if op_named(op).reads_table:
        profile = builder.create_optimization_profile()
        profile.set_shape("table", (1,), (4,), (4,))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return layer, bytes(plan)


def found(trt: Any, name: str) -> dict[str, Any]:
    """What one build shows."""
    op, target, dtype = name.split("-")
    if name == OTHER_VERSION:
        _, network, parsed = parse(trt, model_of(op, version="2"))
        return {"taken": parsed and network.num_layers > 0}
    layer, plan = build(trt, op, target, dtype)
    digest = source_digest(kernel_of(op).source).encode()
    return {"layer": layer, "named": op.encode() in plan, "digest": digest in plan}


def main(out: Path, names: list[str]) -> None:
    trt = flavour_for(None).module
    register_plugins(trt)
    for name in names or (*BUILDS, OTHER_VERSION):
        row = {"build": name, **found(trt, name)}
        with out.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
