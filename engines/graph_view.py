"""An ONNX graph as it is cut: constants apart, what runs between segments, and the depth of every node."""

from __future__ import annotations

from collections import defaultdict

import onnx
from onnx import NodeProto

from longtake.engines.tensor_types import bytes_of, tensor_types
from longtake.errors import LongtakeError
from longtake.formats.onnx_file import INLINE_BYTES, constants_of
from longtake.formats.segmented_graph import TensorType
from longtake.plugins import exchange
from longtake.plugins.registry import op_named
from longtake.plugins.spec import DOMAIN

BETWEEN = (DOMAIN, exchange.DOMAIN)  # what runs between segments


class GraphView:
    """The graph with constants set apart, and a depth for every node."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = constants_of(model)
        self.inputs = [v.name for v in model.graph.input if v.name not in self.constants]
        self.outputs = [v.name for v in model.graph.output]
        self.types = tensor_types(model, self.constants)
        nodes = [n for n in model.graph.node if n.output[0] not in self.constants]
        for node in nodes:
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                raise LongtakeError("cannot cut a graph with nested subgraphs", got=f"{node.op_type} {node.name}")
        self.ops = self._ops_and_views(nodes)
        self.between = {id(n) for n in self.ops}
        self.fixed: dict[str, NodeProto] = {}  # nodes (and unpack ops) whose inputs are all constants, by output
        for node in nodes:
            if node.input and all(not i or i in self.constants or i in self.fixed for i in node.input):
                self.fixed |= dict.fromkeys(node.output, node)
        self.unpacks = {n.output[0]: n for n in self.ops if n.output[0] in self.fixed}
        self.ops = [n for n in self.ops if n.output[0] not in self.fixed]
        self.nodes = [n for n in nodes if id(n) not in self.between and n.output[0] not in self.fixed]
        self.widened = self._widening_casts()
        self.depth = self._depths([n for n in nodes if n.output[0] not in self.fixed])
        self.max_depth = max(self.depth.values(), default=0)

    def _ops_and_views(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """What runs between segments: custom ops, exchanges among ranks, and the reshapes that lead from one straight to others."""
        read_inside = {i for n in nodes if n.domain not in BETWEEN for i in n.input} | set(self.outputs)
        computed = {o for n in nodes if n.domain in BETWEEN for o in n.output}
        return [
            n
            for n in nodes
            if n.domain in BETWEEN
            or (
                n.op_type == "Reshape"
                and n.input[0] in computed
                and n.output[0] not in read_inside
                and self._is_fixed(n)
            )
        ]

    def _is_fixed(self, node: NodeProto) -> bool:
        """Whether the shape of its output is known."""
        kind = self.types.get(node.output[0])
        return kind is not None and all(isinstance(size, int) for size in kind.shape)

    def _widening_casts(self) -> dict[str, NodeProto]:
        """Casts from bf16 to fp32 by output, where a library runs the linears: each segment that reads one casts anew.

        Between many small segments memory traffic counts, and bf16 is half of it. Other cuts stay as they were measured.
        """
        ops = [op_named(n.op_type) for n in self.ops if n.domain == DOMAIN]
        if not any(op.runs_in == "library" and not op.of_frames for op in ops):
            return {}
        dtypes = {name: kind.dtype for name, kind in self.types.items()}
        casts = (n for n in self.nodes if n.op_type == "Cast")
        widening = ("bf16", "fp32")
        return {n.output[0]: n for n in casts if (dtypes.get(n.input[0]), dtypes.get(n.output[0])) == widening}

    def _depths(self, nodes: list[NodeProto]) -> dict[str, int]:
        """Depth by first output name: as early as inputs allow, then ordinary nodes moved as late as consumers do."""
        after: dict[str, int] = defaultdict(int)  # tensor -> depth of the segment that can read it
        ready: dict[str, int] = defaultdict(int)  # ... at which an op can read it: ops of a depth run in order
        depth = {}
        for node in nodes:
            between = id(node) in self.between
            earliest = max((ready if between else after)[i] for i in node.input) if node.input else 0
            depth[node.output[0]] = earliest
            ready |= {o: earliest for o in node.output}
            after |= {o: earliest + between for o in node.output}
        late: dict[str, int] = {name: after[name] for name in self.outputs}
        for node in reversed(nodes):
            if id(node) not in self.between:
                depth[node.output[0]] = min(
                    (late[o] for o in node.output if o in late), default=-1
                )  # -1: nobody reads it
            for name in node.input:
                if depth[node.output[0]] >= 0:
                    late[name] = min(late.get(name, depth[node.output[0]]), depth[node.output[0]])
        return depth

    def type_of(self, name: str) -> TensorType:
        """The dtype and shape of a tensor. Raises LongtakeError if they are not known."""
        if name not in self.types:
            what, got = "a tensor between segments has no known shape", name
            expected, fix = "shapes of all intermediate tensors in the ONNX file", "export again with shape inference"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
        return self.types[name]

    def is_weight(self, name: str) -> bool:
        """Whether a constant goes in as an input: it is large, or comes out of an unpack."""
        return name in self.unpacks or bytes_of(self.type_of(name)) > INLINE_BYTES
