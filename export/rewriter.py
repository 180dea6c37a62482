"""Edits an ONNX graph node by node: new names, replaced inputs, dead nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


class Rewriter:
    """Rebuilds a graph's node list while keeping its topological order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.shared: dict[tuple[str, float], str] = {}

    def node(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output named `output`, and return that name."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}/{op}", domain=domain, **attributes))
        return output

    def scalar(self, name: str, value: float) -> str:
        """An fp32 scalar initializer."""
        return self.tensor(numpy_helper.from_array(np.array(value, np.float32), name))

    def reference(self, name: str, kind: int, shape: list[int]) -> str:
        """An initializer whose content `packed_weight` makes later."""
        return self.tensor(reference(name, kind, shape))

    def scale_and_add(self, product: str, scale: str, bias: Sequence[str], output: str) -> None:
        """output = bf16( fp32(product) * scale ) + bias; `bias` holds one name or none.

        The sum is in bf16, as in the bf16 recipe: an fp32 sum that only reshapes follow costs TensorRT a second kernel.
        """
        wide = self.node("Cast", [product], f"{product}_f32", to=TensorProto.FLOAT)
        scaled = self.node("Mul", [wide, scale], f"{output}.scaled_f32")
        total = self.node("Cast", [scaled], f"{output}.scaled" if bias else output, to=TensorProto.BFLOAT16)
        for name in bias:
            self.node("Add", [total, name], output)

    def weight_shape(self, name: str) -> list[int]:
        """[N, K] of the weight initializer `name`."""
        return list(self.initializers[name].dims)

    def tensor(self, tensor: TensorProto) -> str:
        """Add an initializer unless one of its name is there; return the name."""
        if tensor.name not in self.initializers:
            self.initializers[tensor.name] = tensor
        return tensor.name

    def finish(self) -> None:
        """Write nodes and initializers back; initializers nothing reads any more are dropped."""
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input} | {o.name for o in self.graph.output}
        self.graph.initializer.extend(t for name, t in self.initializers.items() if name in used)


def reference(name: str, kind: int, shape: list[int]) -> TensorProto:
    """A TensorProto without content, marked as external; `files.write_onnx` gives it a place."""
    return TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)


def linear_name(gemm: NodeProto) -> str:
    """The state-dict prefix of the Linear that `gemm` is: "blocks.0.ffn.2" for weight "blocks.0.ffn.2.weight"."""
    return gemm.input[1].removesuffix(".weight") if len(gemm.input) > 1 else ""


def is_tanh_gelu(node: NodeProto) -> bool:
    """Whether a node is GELU by its tanh form."""
    return node.op_type == "Gelu" and any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)
