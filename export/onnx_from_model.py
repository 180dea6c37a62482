"""A network module to a plain bf16 ONNX graph: bindings as in the engine spec, custom ops kept, weights by their key."""

from __future__ import annotations

import copy

import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from longtake.engines.spec import Binding, NetworkSpec
from longtake.export.functions import quiet_exporter, translation_table
from longtake.runtime.errors import LongtakeError

OPSET = 23  # the first with FLOAT4E2M1; read by TensorRT-RTX 1.7 and ONNX Runtime 1.24
IR_VERSION = 11

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int32": torch.int32, "int8": torch.int8}
ONNX_DTYPES = {
    "fp32": onnx.TensorProto.FLOAT,
    "bf16": onnx.TensorProto.BFLOAT16,
    "int32": onnx.TensorProto.INT32,
    "int8": onnx.TensorProto.INT8,
}


class Bound(nn.Module):
    """A network module with its inputs as one variadic list, so that every network exports through the same lines."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.network(*inputs)


def onnx_from_model(network: nn.Module, spec: NetworkSpec) -> onnx.ModelProto:
    """Export `network` with bf16 parameters; boundary dtypes, names and dynamic dimensions are those of `spec`.

    Custom ops stay nodes of the `longtake` domain (their bodies are attached once lowering is done). Weights are named
    by state-dict key without the wrapper's prefix ("blocks.0.ffn.0.weight"). The result is deterministic.
    """
    module = Bound(copy.deepcopy(network)).to(torch.bfloat16).eval()
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, _, high) in spec.profile}
    shapes = tuple({i: dims[d] for i, d in enumerate(b.shape) if isinstance(d, str)} for b in spec.inputs)
    with torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            module,
            tuple(example_input(binding, spec) for binding in spec.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[b.name for b in spec.inputs],
            output_names=[b.name for b in spec.outputs],
            dynamic_shapes=(shapes,),
            custom_translation_table=translation_table(),
            optimize=False,
            verify=False,
            verbose=False,
        )
    if program is None:  # only with f=... given
        raise LongtakeError(f"torch exported nothing for {spec.name}", fix="install the pinned torch")
    fold(program.model)
    return tidy(program.model_proto, spec.name)


def fold(model: onnx_ir.Model) -> None:
    """Fold shape arithmetic and merge equal nodes. Fusions and merging of equal weights are left out on purpose:

    layers stay alike (so that one engine segment serves all of them) and every weight keeps its own name.
    """
    onnxscript.optimizer.fold_constants(model)
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        step(model)


def example_input(binding: Binding, spec: NetworkSpec) -> Tensor:
    """Zeros in the binding's dtype and shape, dynamic dimensions at their profile's optimum."""
    sizes = {name: sizes[1] for name, sizes in spec.profile}
    shape = [sizes[d] if isinstance(d, str) else d for d in binding.shape]
    return torch.zeros(shape, dtype=TORCH_DTYPES[binding.dtype])


def tidy(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Drop what varies from run to run or tells of the exporting machine, and the wrapper's prefix of weight names."""
    model.graph.name, model.doc_string = name, ""
    model.producer_name, model.producer_version = "longtake", ""
    model.ir_version = IR_VERSION
    graph = model.graph
    for message in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del message.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    _rename(graph, {t.name: weight_key(t.name) for t in graph.initializer})
    return model


def weight_key(name: str) -> str:
    """The state-dict key of a parameter of a step module: "network.dit.head.head.weight" is "head.head.weight"."""
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] == "network" and len(parts) > 2 else name


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for i, given in enumerate(node.input):
            node.input[i] = names.get(given, given)
