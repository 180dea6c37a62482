"""Which tensor of an exported view is which torch module's output, so that the two can be compared layer by layer.

Weights are named by state-dict key, also after lowering ("KEY.dequantized", "KEY.bf16"), so a Gemm or Conv names its
module. The output of transformer block i is the first sum of two computed tensors after `blocks.i.ffn.2`.
"""

from __future__ import annotations

import re
from collections import defaultdict

import onnx
from onnx import NodeProto, TensorProto, helper

LOWERED = (".dequantized", ".bf16")
UNSCALED = ".unscaled"
BLOCK = re.compile(r"blocks\.\d+")
BLOCK_END = re.compile(r"(blocks\.\d+)\.ffn\.2")


def layer_tensors(view: onnx.ModelProto) -> dict[str, str]:
    """{module name: tensor of its output} in graph order: blocks, and all Gemms and Convs."""
    tensors: dict[str, str] = {}
    graph = _Graph(view)
    for node in view.graph.node:
        if node.op_type not in ("Gemm", "Conv") or len(node.input) < 2:
            continue
        module, output = module_name(node.input[1]), node.output[0].removesuffix(UNSCALED)
        if module is None:
            continue
        tensors[module] = output
        end = BLOCK_END.fullmatch(module)
        if end and (total := graph.residual_after(output)):
            tensors[end.group(1)] = total
    return tensors


def module_name(weight: str) -> str | None:
    """The module that owns initializer `weight`, or None if the name is no state-dict key of a weight."""
    for suffix in LOWERED:
        weight = weight.removesuffix(suffix)
    return weight.removesuffix(".weight") if weight.endswith(".weight") else None


def with_outputs(view: onnx.ModelProto, tensors: list[str]) -> onnx.ModelProto:
    """A copy of `view` that also outputs `tensors` (fp32)."""
    marked = onnx.ModelProto()
    marked.CopyFrom(view)
    have = {value.name for value in marked.graph.output}
    extra = [name for name in dict.fromkeys(tensors) if name not in have]
    marked.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extra)
    return marked


class _Graph:
    """Consumers of each tensor, and which tensors are constants or made of constants alone."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        self.fixed = {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
            if all(name in self.fixed for name in node.input if name):
                self.fixed.update(node.output)

    def residual_after(self, tensor: str) -> str | None:
        """The first Add of two computed tensors on the single path from `tensor`; None if the path forks or ends."""
        while True:
            readers = self.consumers[tensor]
            if len(readers) != 1:
                return None
            node = readers[0]
            if node.op_type == "Add" and not self.fixed.intersection(node.input):
                return node.output[0]
            tensor = node.output[0]
