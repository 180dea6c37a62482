"""Cut any ONNX graph at the custom ops of the `longtake` domain into segments that share plans.

A node's depth is the number of custom ops passed on the way to it; the nodes of one depth become one ONNX model.
Weights become inputs, tensors are renamed by position, and segments equal after that are one plan: all middle layers
of a transformer. A reshape between two custom ops is no segment but a view. Nodes sit as late as their consumers allow,
so that what only layer 7 needs is in layer 7's segment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from longtake.engines.graph_view import GraphView
from longtake.engines.tensor_types import value_info
from longtake.errors import LongtakeError
from longtake.formats.onnx_file import INLINE_BYTES
from longtake.formats.segmented_graph import Segment, SegmentedGraph, Step, StepKind
from longtake.plugins import exchange
from longtake.plugins.spec import DOMAIN

FLOATS = ("fp32", "fp16", "bf16")
KINDS: dict[str, StepKind] = {DOMAIN: "op", exchange.DOMAIN: "exchange"}  # of what runs between segments, by domain


@dataclass(frozen=True)
class CutNetwork:
    """The steps, and the ONNX model of each distinct segment."""

    graph: SegmentedGraph
    models: dict[str, onnx.ModelProto]


def segments_from_onnx(model: onnx.ModelProto, network: str) -> CutNetwork:
    """Cut `model` (external data need not be loaded).

    Raises:
        LongtakeError: a node has a subgraph, or a tensor between segments has no static shape.
    """
    view = GraphView(model)
    bodies = [_Body(view, depth) for depth in range(view.max_depth + 1)]
    bodies = [body for body in bodies if body.nodes]
    plans, models = _share_plans(view, bodies, network)
    steps = _in_place(_ordered_steps(view, {body.depth: body for body in bodies}))
    used = {name for step in steps for name in (*step.inputs, *step.outputs)} | set(view.outputs)
    graph = SegmentedGraph(
        network,
        tuple(view.inputs),
        tuple(view.outputs),
        tuple(name for name in view.constants if name in used),
        {name: view.type_of(name) for name in sorted(used | set(view.inputs))},
        tuple(plans),
        tuple(steps),
    )
    return CutNetwork(graph, models)


class _Body:
    """The nodes of one depth, with constant nodes copied in, and their interface."""

    def __init__(self, view: GraphView, depth: int) -> None:
        self.view, self.depth = view, depth
        here = [n for n in view.nodes if view.depth[n.output[0]] == depth]
        self.nodes = self._with_constant_nodes(here)
        computed = {o for n in self.nodes for o in n.output if o}
        read = list(dict.fromkeys(i for n in self.nodes for i in n.input if i and i not in computed))
        self.runtime = [i for i in read if i not in view.constants and i not in view.unpacks]
        self.weights = [i for i in read if i not in self.runtime and view.is_weight(i)]
        self.small = [i for i in read if i not in self.runtime and i not in self.weights]
        self.promoted: list[str] = []
        outside = self._read_outside(here)
        self.outputs = [o for n in here for o in n.output if o in outside]
        self.plan = ""

    def _with_constant_nodes(self, nodes: list[NodeProto]) -> list[NodeProto]:
        ordered: dict[int, NodeProto] = {}

        def add(node: NodeProto) -> None:
            for name in node.input:
                if name in self.view.fixed and name not in self.view.unpacks:
                    add(self.view.fixed[name])
                elif name in self.view.widened:
                    add(self.view.widened[name])
            ordered.setdefault(id(node), node)

        for node in nodes:
            add(node)
        return list(ordered.values())

    def _read_outside(self, nodes: list[NodeProto]) -> set[str]:
        inside = {id(n) for n in nodes}
        others = (n for n in (*self.view.nodes, *self.view.ops) if id(n) not in inside)
        live = (n for n in others if self.view.depth[n.output[0]] >= 0)
        return {self._source(n, i) for n in live for i in n.input} | set(self.view.outputs)

    def _source(self, reader: NodeProto, name: str) -> str:
        """What a segment or op takes in when `reader` reads `name`: of a widening cast, a segment takes the input."""
        inside = id(reader) not in self.view.between
        return self.view.widened[name].input[0] if inside and name in self.view.widened else name

    @property
    def inputs(self) -> list[str]:
        return [*self.runtime, *self.weights, *self.promoted]

    def canonical_names(self) -> dict[str, str]:
        """Graph tensor -> name by position: x runtime inputs, w weights, c constants, y outputs, t the rest."""
        named: dict[str, str] = {}
        for letter, names in (("x", self.runtime), ("w", self.weights), ("c", self.small), ("y", self.outputs)):
            named |= {name: f"{letter}{i}" for i, name in enumerate(names)}
        rest = (o for n in self.nodes for o in n.output if o and o not in named)
        return named | {name: f"t{i}" for i, name in enumerate(rest)}

    def canonical_nodes(self) -> list[NodeProto]:
        """The nodes with canonical tensor names and nothing that differs between equal segments."""
        names = self.canonical_names()
        nodes = []
        for i, node in enumerate(self.nodes):
            clean = NodeProto(op_type=node.op_type, domain=node.domain, name=f"n{i}")
            clean.input.extend(names.get(name, "") for name in node.input)
            clean.output.extend(names.get(name, "") for name in node.output)
            clean.attribute.extend(sorted(node.attribute, key=lambda a: a.name))
            for attribute in clean.attribute:
                attribute.doc_string = ""
            nodes.append(clean)
        return nodes

    def structure(self) -> str:
        """Digest of everything but the values of small floating-point constants."""
        digest = hashlib.sha256()
        for node in self.canonical_nodes():
            digest.update(node.SerializeToString(deterministic=True))
        for name in (*self.runtime, *self.weights, *self.small, *self.outputs):
            digest.update(repr(self.view.type_of(name)).encode())
            if name in self.small and self.view.type_of(name).dtype not in FLOATS:
                digest.update(_raw(self.view.constants[name]))
        return digest.hexdigest()


def _share_plans(
    view: GraphView, bodies: list[_Body], network: str
) -> tuple[list[Segment], dict[str, onnx.ModelProto]]:
    shared: dict[str, list[_Body]] = {}
    for body in bodies:
        members = shared.setdefault(body.structure(), [])
        members.append(body)
        body.plan = members[0].plan or f"{network}_seg{len(shared) - 1}"
    for members in shared.values():
        _promote_differing_constants(view, members)
    first = [members[0] for members in shared.values()]
    return [_segment_of(body) for body in first], {body.plan: _model_of(view, body) for body in first}


def _promote_differing_constants(view: GraphView, members: list[_Body]) -> None:
    """A small constant that is not the same in all members (a per-tensor scale, say) becomes an input."""
    slots = zip(*(body.small for body in members), strict=True)
    differing = [i for i, names in enumerate(slots) if len({_raw(view.constants[n]) for n in names}) > 1]
    for body in members:
        body.promoted = [body.small[i] for i in differing]


def _segment_of(body: _Body) -> Segment:
    names = body.canonical_names()
    inputs, outputs = (tuple(names[n] for n in group) for group in (body.inputs, body.outputs))
    types = {names[n]: body.view.type_of(n) for n in (*body.inputs, *body.outputs)}
    return Segment(body.plan, inputs, outputs, types)


def _model_of(view: GraphView, body: _Body) -> onnx.ModelProto:
    names = body.canonical_names()
    kept = [_renamed(view.constants[n], names[n]) for n in body.small if n not in body.promoted]
    values = {n: value_info(names[n], view.type_of(n)) for n in (*body.inputs, *body.outputs)}
    nodes = body.canonical_nodes()
    domains = {node.domain for node in nodes} | {""}
    graph = helper.make_graph(
        nodes, body.plan, [values[n] for n in body.inputs], [values[n] for n in body.outputs], kept
    )
    return helper.make_model(
        graph,
        producer_name="longtake",
        ir_version=view.model.ir_version,
        opset_imports=[o for o in view.model.opset_import if o.domain in domains or o.domain == "ai.onnx"],
        functions=[f for f in view.model.functions if f.domain in domains - {"", "ai.onnx"}],
    )


def _ordered_steps(view: GraphView, bodies: dict[int, _Body]) -> Iterable[Step]:
    for depth in range(view.max_depth + 1):
        if body := bodies.get(depth):
            yield from _unpacked(view, body.weights)
            yield Step("segment", body.plan, tuple(body.inputs), tuple(body.outputs))
        for op in (op for op in view.ops if view.depth[op.output[0]] == depth):
            yield from _unpacked(view, op.input)
            yield _op_step(KINDS.get(op.domain, "view"), op)


def _unpacked(view: GraphView, names: Iterable[str]) -> Iterable[Step]:
    """What unpacks those of `names` that are packed weights."""
    return (_op_step("unpack", view.unpacks[name]) for name in names if name in view.unpacks)


def _in_place(steps: Iterable[Step]) -> list[Step]:
    """A halo is exchanged where the tensor lies: what reads its output reads its input."""
    same: dict[str, str] = {}
    out = []
    for step in steps:
        step = replace(step, inputs=tuple(same.get(name, name) for name in step.inputs))
        if step.kind == "exchange" and step.name.startswith(exchange.HALO):
            same[step.outputs[0]] = step.inputs[0]
            step = replace(step, outputs=())
        out.append(step)
    return out


def _op_step(kind: StepKind, node: NodeProto) -> Step:
    inputs = node.input[:1] if kind == "view" else node.input  # without the shape
    ghost = next((f"_{a.i}" for a in node.attribute if kind == "exchange" and a.name == "ghost"), "")
    return Step(kind, node.op_type + ghost, tuple(inputs), tuple(node.output))


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name, copy.doc_string = name, ""
    return copy


def _raw(tensor: TensorProto) -> bytes:
    """Bytes of a small constant. External data of small tensors must have been loaded."""
    if tensor.data_location == TensorProto.EXTERNAL:
        raise LongtakeError(
            "a small constant lies in external data",
            got=tensor.name,
            expected=f"constants of up to {INLINE_BYTES} bytes inside the ONNX file",
            fix="load the model with its external data, or export again with a size threshold",
        )
    return numpy_helper.to_array(tensor).tobytes()
