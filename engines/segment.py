"""Cut any ONNX graph at the custom ops of the `longtake` domain into segments that share plans.

A node's depth is the number of custom ops passed on the way to it; the nodes of one depth become one ONNX model.
Weights become inputs, tensors are renamed by position, and segments equal after that are one plan: all middle layers
of a transformer. A reshape between two custom ops is no segment but a view. Nodes sit as late as their consumers allow,
so that what only layer 7 needs is in layer 7's segment.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from longtake.dtypes import BY_ONNX, DTYPES
from longtake.errors import LongtakeError
from longtake.formats.onnx_file import INLINE_BYTES, constants_of
from longtake.formats.segmented_graph import Segment, SegmentedGraph, Step, StepKind, TensorType
from longtake.plugins.registry import all_ops, op_named
from longtake.plugins.shapes import infer_dtype, infer_shape
from longtake.plugins.spec import DOMAIN

FLOATS = ("fp32", "fp16", "bf16")


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
    view = _GraphView(model)
    bodies = [_Body(view, depth) for depth in range(view.max_depth + 1)]
    bodies = [body for body in bodies if body.nodes]
    plans, models = _share_plans(view, bodies, network)
    steps = list(_ordered_steps(view, {body.depth: body for body in bodies}))
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


class _GraphView:
    """The graph with constants set apart, and a depth for every node."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = constants_of(model)
        self.inputs = [v.name for v in model.graph.input if v.name not in self.constants]
        self.outputs = [v.name for v in model.graph.output]
        self.types = _tensor_types(model, self.constants)
        nodes = [n for n in model.graph.node if n.output[0] not in self.constants]
        for node in nodes:
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                raise LongtakeError("cannot cut a graph with nested subgraphs", got=f"{node.op_type} {node.name}")
        self.ops = self._ops_and_views(nodes)
        self.between = {id(n) for n in self.ops}
        self.fixed: dict[str, NodeProto] = {}  # nodes (and unpack ops) whose inputs are all constants, by output
        self._set_constant_nodes_apart(nodes)
        self.unpacks = {n.output[0]: n for n in self.ops if n.output[0] in self.fixed}
        self.ops = [n for n in self.ops if n.output[0] not in self.fixed]
        self.nodes = [n for n in nodes if id(n) not in self.between and n.output[0] not in self.fixed]
        self.widened = self._widening_casts()
        self.depth = self._depths([n for n in nodes if n.output[0] not in self.fixed])
        self.max_depth = max(self.depth.values(), default=0)

    def _ops_and_views(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """What runs between segments: custom ops, and the reshapes that lead from one straight to others."""
        read_inside = {i for n in nodes if n.domain != DOMAIN for i in n.input} | set(self.outputs)
        made = {o for n in nodes if n.domain == DOMAIN for o in n.output}
        return [
            n
            for n in nodes
            if n.domain == DOMAIN
            or (n.op_type == "Reshape" and n.input[0] in made and n.output[0] not in read_inside and self._is_fixed(n))
        ]

    def _is_fixed(self, node: NodeProto) -> bool:
        """Whether the shape of its output is known."""
        kind = self.types.get(node.output[0])
        return kind is not None and all(isinstance(size, int) for size in kind.shape)

    def _set_constant_nodes_apart(self, nodes: list[NodeProto]) -> None:
        for node in nodes:
            if node.input and all(not i or i in self.constants or i in self.fixed for i in node.input):
                self.fixed |= {output: node for output in node.output}

    def _widening_casts(self) -> dict[str, NodeProto]:
        """Casts from bf16 to fp32 by output, where a library runs the linears: each segment that reads one casts anew.

        Between many small segments memory traffic counts, and bf16 is half of it. Other cuts stay as they were measured.
        """
        ops = [op_named(n.op_type) for n in self.ops if n.domain == DOMAIN]
        if not any(op.runs_in == "library" and not op.of_frames for op in ops):
            return {}
        casts = [
            n for n in self.nodes if n.op_type == "Cast" and n.output[0] in self.types and n.input[0] in self.types
        ]
        return {
            n.output[0]: n
            for n in casts
            if (self.types[n.input[0]].dtype, self.types[n.output[0]].dtype) == ("bf16", "fp32")
        }

    def _depths(self, nodes: list[NodeProto]) -> dict[str, int]:
        """Depth by first output name: as early as inputs allow, then ordinary nodes moved as late as consumers do."""
        after: dict[str, int] = defaultdict(int)  # tensor -> depth of the segment that can read it
        made: dict[str, int] = defaultdict(int)  # ... at which an op can read it: ops of a depth run in order
        depth = {}
        for node in nodes:
            between = id(node) in self.between
            own = max((made if between else after)[i] for i in node.input) if node.input else 0
            depth[node.output[0]] = own
            made |= {o: own for o in node.output}
            after |= {o: own + between for o in node.output}
        late: dict[str, int] = {name: after[name] for name in self.outputs}
        for node in reversed(nodes):
            if id(node) not in self.between:
                wanted = [late[o] for o in node.output if o in late]
                depth[node.output[0]] = min(wanted) if wanted else -1  # -1: nobody reads it
            for name in node.input:
                if depth[node.output[0]] >= 0:
                    late[name] = min(late.get(name, depth[node.output[0]]), depth[node.output[0]])
        return depth

    def type_of(self, name: str) -> TensorType:
        """The dtype and shape of a tensor. Raises LongtakeError if they are not known."""
        if name not in self.types:
            raise LongtakeError(
                "a tensor between segments has no known shape",
                got=name,
                expected="shapes of all intermediate tensors in the ONNX file",
                fix="export again with shape inference",
            )
        return self.types[name]

    def is_weight(self, name: str) -> bool:
        """Whether a constant goes in as an input: it is large, or comes out of an unpack."""
        return name in self.unpacks or _bytes(self.type_of(name)) > INLINE_BYTES


class _Body:
    """The nodes of one depth, with constant nodes copied in, and their interface."""

    def __init__(self, view: _GraphView, depth: int) -> None:
        self.view, self.depth = view, depth
        own = [n for n in view.nodes if view.depth[n.output[0]] == depth]
        self.nodes = self._with_constant_nodes(own)
        made = {o for n in self.nodes for o in n.output if o}
        read = list(dict.fromkeys(i for n in self.nodes for i in n.input if i and i not in made))
        self.runtime = [i for i in read if i not in view.constants and i not in view.unpacks]
        self.weights = [i for i in read if i not in self.runtime and view.is_weight(i)]
        self.small = [i for i in read if i not in self.runtime and i not in self.weights]
        self.promoted: list[str] = []
        outside = self._read_outside(own)
        self.outputs = [o for n in own for o in n.output if o in outside]
        self.plan = ""

    def _with_constant_nodes(self, own: list[NodeProto]) -> list[NodeProto]:
        ordered: dict[int, NodeProto] = {}

        def add(node: NodeProto) -> None:
            for name in node.input:
                if name in self.view.fixed and name not in self.view.unpacks:
                    add(self.view.fixed[name])
                elif name in self.view.widened:
                    add(self.view.widened[name])
            ordered.setdefault(id(node), node)

        for node in own:
            add(node)
        return list(ordered.values())

    def _read_outside(self, own: list[NodeProto]) -> set[str]:
        inside = {id(n) for n in own}
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


@dataclass
class _Shared:
    name: str
    members: list[_Body] = field(default_factory=list)


def _share_plans(
    view: _GraphView, bodies: list[_Body], network: str
) -> tuple[list[Segment], dict[str, onnx.ModelProto]]:
    shared: dict[str, _Shared] = {}
    for body in bodies:
        entry = shared.setdefault(body.structure(), _Shared(f"{network}_seg{len(shared)}"))
        entry.members.append(body)
        body.plan = entry.name
    plans, models = [], {}
    for entry in shared.values():
        _promote_differing_constants(view, entry.members)
        models[entry.name] = _model_of(view, entry.members[0])
        plans.append(_segment_of(entry.name, entry.members[0]))
    return plans, models


def _promote_differing_constants(view: _GraphView, members: list[_Body]) -> None:
    """A small constant that is not the same in all members (a per-tensor scale, say) becomes an input."""
    slots = zip(*(body.small for body in members), strict=True)
    differing = [i for i, names in enumerate(slots) if len({_raw(view.constants[n]) for n in names}) > 1]
    for body in members:
        body.promoted = [body.small[i] for i in differing]


def _segment_of(name: str, body: _Body) -> Segment:
    names = body.canonical_names()
    inputs, outputs = (tuple(names[n] for n in group) for group in (body.inputs, body.outputs))
    types = {names[n]: body.view.type_of(n) for n in (*body.inputs, *body.outputs)}
    return Segment(name, inputs, outputs, types)


def _model_of(view: _GraphView, body: _Body) -> onnx.ModelProto:
    names = body.canonical_names()
    kept = [_renamed(view.constants[n], names[n]) for n in body.small if n not in body.promoted]
    values = {n: _value_info(names[n], view.type_of(n)) for n in (*body.inputs, *body.outputs)}
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


def _ordered_steps(view: _GraphView, bodies: dict[int, _Body]) -> Iterable[Step]:
    for depth in range(view.max_depth + 1):
        if body := bodies.get(depth):
            yield from (_op_step("unpack", view.unpacks[name]) for name in body.weights if name in view.unpacks)
            yield Step("segment", body.plan, tuple(body.inputs), tuple(body.outputs))
        here = (op for op in view.ops if view.depth[op.output[0]] == depth)
        yield from (_op_step("op", op) if op.domain == DOMAIN else _view_step(op) for op in here)


def _op_step(kind: StepKind, node: NodeProto) -> Step:
    return Step(kind, node.op_type, tuple(node.input), tuple(node.output))


def _view_step(node: NodeProto) -> Step:
    return Step("view", node.op_type, (node.input[0],), (node.output[0],))


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


def _bytes(kind: TensorType) -> int:
    count = 1
    for size in kind.shape:
        count *= size if isinstance(size, int) else 1
    return DTYPES[kind.dtype].bytes(count)


def _value_info(name: str, kind: TensorType) -> ValueInfoProto:
    if any(not isinstance(size, int) for size in kind.shape):
        raise LongtakeError("a segment input or output has a dynamic shape", got=f"{name} {kind.shape}")
    return helper.make_tensor_value_info(name, DTYPES[kind.dtype].onnx, kind.shape)


def _type_from(info: ValueInfoProto) -> TensorType | None:
    tensor = info.type.tensor_type
    if tensor.elem_type not in BY_ONNX or not tensor.HasField("shape"):
        return None
    dims = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim)
    return TensorType(BY_ONNX[tensor.elem_type].name, dims)


def _tensor_types(model: onnx.ModelProto, constants: dict[str, TensorProto]) -> dict[str, TensorType]:
    """Types from the file's value_info; what is missing there comes from shape inference, op by op."""
    types = {name: TensorType(BY_ONNX[t.data_type].name, tuple(t.dims)) for name, t in constants.items()}
    graph = model.graph
    infos = (*graph.value_info, *graph.input, *graph.output)
    types |= {info.name: kind for info in infos if (kind := _type_from(info))}
    wanted = {o for node in graph.node for o in node.output if o}
    while wanted - types.keys():
        before = len(types)
        _infer_custom_ops(graph.node, types)
        _infer_standard_ops(model, types)
        if len(types) == before:
            break
    return types


def _infer_custom_ops(nodes: Iterable[NodeProto], types: dict[str, TensorType]) -> None:
    """An op's output has the type of the input that it is written over, or else what its spec says, if that is known."""
    for node in nodes:
        if node.domain != DOMAIN or node.op_type not in all_ops() or node.input[0] not in types:
            continue
        spec = op_named(node.op_type).spec
        aliases = dict(spec.aliases)
        inputs = [types.get(name) for name in node.input]
        for i, output in enumerate(node.output):
            source = inputs[aliases[i]] if i in aliases else None
            if source is None and i not in aliases:
                shape = infer_shape(spec, i, [kind.shape if kind else None for kind in inputs])
                if None not in shape:
                    source = TensorType(
                        infer_dtype(spec, i, [kind.dtype if kind else "bf16" for kind in inputs]), shape
                    )
            if source is not None:
                types.setdefault(output, source)


def _infer_standard_ops(model: onnx.ModelProto, types: dict[str, TensorType]) -> None:
    known = {info.name for info in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.value_info.extend(
        helper.make_tensor_value_info(name, DTYPES[kind.dtype].onnx, kind.shape)
        for name, kind in types.items()
        if name not in known
    )
    for info in onnx.shape_inference.infer_shapes(copy, data_prop=True).graph.value_info:
        kind = _type_from(info)
        if kind and info.name not in types:
            types[info.name] = kind
