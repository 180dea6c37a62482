"""Linears in 8-bit floats that a library runs: which ops of ours they become, with what lies before and behind them.

    codes = a norm of a block, GELU or quantize_fp8, whichever makes what the linear reads: E4M3 of x * 448 / amax
    y     = linear_fp8(codes, W)  where one op alone reads it that applies the scale and adds the bias (a norm, GELU)
            linear_rows_fp8(codes, W, scale, bias)  elsewhere

Codes and scales of W are those of lower_fp8: one scale a row, times the activation's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from longtake.errors import LongtakeError
from longtake.export.rewriter import is_tanh_gelu
from longtake.plugins.fp8 import multiplier
from longtake.plugins.registry import op_named
from longtake.plugins.spec import DOMAIN, PLUGIN_ATTRIBUTES

if TYPE_CHECKING:
    from longtake.export.rewriter import Rewriter


class Fp8LibraryLowering:
    """Rewrites a graph's nodes in order.

    Args:
        linears: linear name -> its node. input_amax: the calibrated amax of a linear's input, by name.
    """

    def __init__(self, rewriter: Rewriter, linears: dict[str, NodeProto], input_amax: dict[str, float]) -> None:
        self.rewriter, self.input_amax = rewriter, input_amax
        self.named = {node.output[0]: name for name, node in linears.items()}  # output -> linear
        self.bias = {node.output[0]: node.input[2] for node in linears.values()}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        self.maker: dict[str, NodeProto] = {}
        self.quantized: set[str] = set()
        for node in rewriter.graph.node:
            for name in node.input:
                self.readers[name].append(node)
            self.maker |= dict.fromkeys(node.output, node)

    def run(self) -> None:
        """Append the new nodes to the rewriter."""
        for node in self.rewriter.graph.node:
            if node.output[0] in self.named:
                self._linear(node)
            elif self._is_norm(node):
                self._norm(node)
            elif self._is_gelu(node):
                inputs = [*self._raw(node.input[0]), self._factor(node.output[0])]
                self._op("gelu_quantize_fp8", inputs, [self._codes(node.output[0])])
            else:
                self.rewriter.nodes.append(node)

    # what nodes are

    def _is_norm(self, node: NodeProto) -> bool:
        return bool(_quantized(node)) and self._only_linears_read(node.output[-1])

    def _is_gelu(self, node: NodeProto) -> bool:
        return is_tanh_gelu(node) and self._is_raw(node.input[0]) and self._only_linears_read(node.output[0])

    def _only_linears_read(self, name: str) -> bool:
        readers = self.readers[name]
        return bool(readers) and all(node.output[0] in self.named and node.input[0] == name for node in readers)

    def _is_raw(self, name: str) -> bool:
        """Whether `name` is a linear's output that one op alone reads which takes the bare product."""
        readers = self.readers[name]
        if name not in self.named or len(readers) != 1:
            return False
        reader = readers[0]
        if reader.op_type == "Gelu":
            return self._only_linears_read(reader.output[0])
        return self._is_norm(reader) and len(reader.output) == 2 and reader.input[1] == name

    # what they become

    def _linear(self, node: NodeProto) -> None:
        weight, out = node.input[1], node.output[0]
        rows, columns = self.rewriter.weight_shape(weight)
        codes = self.rewriter.reference(f"{weight}.values", TensorProto.FLOAT8E4M3FN, [rows, columns])
        self.rewriter.reference(f"{weight}.scale", TensorProto.FLOAT, [rows])
        activation = self._activation(node.input[0])
        if self._is_raw(out):
            self._op("linear_fp8", [activation, codes], [f"{out}.unscaled"])
        else:
            self._op("linear_rows_fp8", [activation, codes, f"{weight}.scale", node.input[2]], [out])

    def _norm(self, node: NodeProto) -> None:
        x, *rest = node.input
        if len(node.output) == 2:
            y, *rest = rest
            if not self._is_raw(y):
                what, expected = (
                    "a block's norm must follow a linear in 8 bits",
                    "the linear's output, read by nothing else",
                )
                raise LongtakeError(what, got=node.name or node.op_type, expected=expected)
            rest = [*self._raw(y), *rest]
        outputs = [*node.output[:-1], self._codes(node.output[-1])]
        self._op(_quantized(node), [x, *rest, self._factor(node.output[-1])], outputs)

    def _raw(self, output: str) -> list[str]:
        """A linear's bare product, its scale and its bias."""
        weight = f"{self.named[output]}.weight"
        return [f"{output}.unscaled", f"{weight}.scale", self.bias[output]]

    def _activation(self, x: str) -> str:
        """The codes of what a linear reads; quantized here unless the op that makes it does."""
        maker = self.maker.get(x)
        quantizes = maker is not None and (self._is_norm(maker) or self._is_gelu(maker))
        if not quantizes and x not in self.quantized:
            self._op("quantize_fp8", [x, self._factor(x)], [self._codes(x)])
            self.quantized.add(x)
        return self._codes(x)

    def _codes(self, x: str) -> str:
        return f"{x}.codes"

    def _factor(self, x: str) -> str:
        """fp32 [1]: 448 / amax of `x`, which all linears that read it must agree on."""
        names = [self.named[node.output[0]] for node in self.readers[x] if node.output[0] in self.named]
        amax = {name: self.input_amax[name] for name in names}
        if len(set(amax.values())) != 1:
            fix = "calibrate the checkpoint again (longtake convert --calibrate), or set linears: engine"
            what = "linears of one input have another amax each"
            raise LongtakeError(what, got=amax, expected="the amax of their input", fix=fix)
        value = np.array([float(multiplier(torch.tensor(next(iter(amax.values())))))], np.float32)
        # By the first linear that reads it, not by the exporter's number for `x`: a rank's graph has other numbers. And no dot,
        # which names of parameters alone have: a benchmark makes those up.
        name = f"{names[0]}.input_factor".replace(".", "_")
        return self.rewriter.tensor(numpy_helper.from_array(value, name))

    def _op(self, op: str, inputs: Collection[str], outputs: list[str]) -> None:
        name = f"{outputs[-1]}/{op}"
        node = helper.make_node(op, list(inputs), outputs, name=name, domain=DOMAIN, **PLUGIN_ATTRIBUTES)
        self.rewriter.nodes.append(node)


def _quantized(node: NodeProto) -> str:
    """The op that gives a node's last output in E4M3; "" if there is none."""
    return op_named(node.op_type).quantized if node.domain == DOMAIN else ""
