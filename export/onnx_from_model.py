"""A network module to a plain bf16 ONNX graph: bindings as in the engine spec, custom ops kept, weights by their key.

Weights are references (name, type, shape) without content: the network is exported over memory that is never touched,
so a 5B model takes no more of it than a small one. `files.write_onnx` is given the content, one tensor at a time.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.export.functions import Variadic, quiet_exporter, translation_table
from longtake.training.models.network_spec import Binding, NetworkSpec

OPSET = 23  # the first with FLOAT4E2M1; read by TensorRT-RTX 1.7 and ONNX Runtime 1.24
IR_VERSION = 11
UNIFORM_BYTES = 256  # a constant of one value above this is generated, not stored


def onnx_from_model(network: nn.Module, spec: NetworkSpec) -> onnx.ModelProto:
    """Export `network` with bf16 parameters; boundary dtypes, names and dynamic dimensions are those of `spec`.

    The parameters' values play no part: they may lie on the meta device. Custom ops stay nodes of the `longtake` domain
    (their bodies are attached once lowering is done). Weights are references named by state-dict key without the
    wrapper's prefix ("blocks.0.ffn.0.weight"). The result is deterministic.
    """
    module = Variadic(empty_copy(network)).eval()
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
    weights = _without_content(program.model, set(module.state_dict()))
    fold(program.model)
    for value, reference in weights:
        value.const_value = reference
    return tidy(program.model_proto, spec.name)


def empty_copy(network: nn.Module) -> nn.Module:
    """A copy of `network` with bf16 parameters and buffers in memory of the CPU that nobody has touched.

    Raises:
        LongtakeError: a buffer is not in the state dict, so that its content would be lost.
    """
    held = {*map(id, network.state_dict(keep_vars=True).values())}
    memo: dict[int, object] = {}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if id(tensor) not in held:
            what, fix = (
                f"buffer {name} is in no checkpoint",
                "register it with persistent=True, or compute it in forward",
            )
            raise LongtakeError(what, expected="persistent buffers only", fix=fix)
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, memo)


def _without_content(model: onnx_ir.Model, names: set[str]) -> list[tuple[onnx_ir.Value, onnx_ir.ExternalTensor]]:
    """Take the content of the initializers in `names` away, so that nothing is folded with it; what refers to each."""
    references = []
    for name, value in model.graph.initializers.items():
        if name in names and (tensor := value.const_value) is not None:
            shape = onnx_ir.Shape([int(str(d)) for d in tensor.shape])
            references.append((value, onnx_ir.ExternalTensor("", 0, 0, tensor.dtype, shape=shape, name=name)))
            value.const_value = None
    return references


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
    """A tensor, never touched, in the binding's dtype and shape, dynamic dimensions at their profile's optimum."""
    sizes = {name: sizes[1] for name, sizes in spec.profile}
    shape = [sizes[d] if isinstance(d, str) else d for d in binding.shape]
    return torch.empty(shape, dtype=DTYPES[binding.dtype].torch)


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
    for tensor in graph.initializer:
        del tensor.external_data[:]
    _rename(graph, {t.name: weight_key(t.name) for t in graph.initializer})
    _generate_uniform_constants(graph)
    return model


def _generate_uniform_constants(graph: onnx.GraphProto) -> None:
    """Replace large constants of one value (a LayerNorm's ones) by ConstantOfShape, one for all that are equal.

    They are no weights: a skeleton must hold them, and a segment must not take them as inputs.
    """
    stored: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    kept, nodes, names = [], [], {}
    for tensor in graph.initializer:
        values = np.frombuffer(tensor.raw_data, np.uint8).reshape(max(1, math.prod(tensor.dims)), -1)
        if len(tensor.raw_data) <= UNIFORM_BYTES or (values != values[0]).any():
            kept.append(tensor)
            continue
        key = tensor.data_type, tuple(tensor.dims), values[0].tobytes()
        if key not in stored:
            stored[key] = tensor.name
            kept.append(onnx.numpy_helper.from_array(np.array(tensor.dims, np.int64), f"{tensor.name}.shape"))
            value = onnx.helper.make_tensor("", tensor.data_type, [1], key[2], raw=True)
            shape, name = f"{tensor.name}.shape", f"{tensor.name}/ConstantOfShape"
            nodes.append(onnx.helper.make_node("ConstantOfShape", [shape], [tensor.name], value=value, name=name))
        names[tensor.name] = stored[key]
    _rename(graph, {t.name: t.name for t in graph.initializer} | names)
    nodes.extend(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


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
