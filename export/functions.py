"""The custom ops in ONNX: schemas, the torch exporter's translation table, and function bodies derived from references.

A node of the `longtake` domain carries `plugin_namespace` and `plugin_version`: TensorRT's parser makes it a plugin.
Every other runtime runs its function body, which is the exported PyTorch reference and never written by hand. Bodies
compute in fp32 and return the activation dtype they were given, so one body serves bf16 graphs and fp32 views.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor, nn

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.export.exchanges import translations
from longtake.export.torchlib import read_once
from longtake.plugins.ops import torch_op
from longtake.plugins.registry import all_ops
from longtake.plugins.shapes import infer_dtype, infer_shape, shape_of, torch_dtype
from longtake.plugins.spec import DOMAIN, PLUGIN_ATTRIBUTES, Op, OpSpec, TensorSpec

DOMAIN_VERSION = 1
DEFAULT_OPSET = 23

_DYNAMIC = ("W", "N", "K", "T", "Y", "X", "C")  # a body serves every size of these; others are fixed when it is made
_COMPUTE_TYPES = ["tensor(bfloat16)", "tensor(float16)", "tensor(float)"]


# --- schemas


def register_schemas() -> None:
    """Make the ops known to onnx's checker and shape inference; repeated calls do nothing."""
    for name, op in all_ops().items():
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(op_schema(op.spec))
            # onnx's registry outlives the interpreter and would call into it to free the inference function
            atexit.register(onnx.defs.deregister_schema, name, DOMAIN_VERSION, DOMAIN)


def op_schema(spec: OpSpec) -> OpSchema:
    """The ONNX schema of an op, with attributes `plugin_namespace` and `plugin_version` and shape inference."""

    def formal(tensor: TensorSpec, ending: str = "") -> OpSchema.FormalParameter:
        return OpSchema.FormalParameter(tensor.name + ending, _type_string(tensor.dtype))

    schema = OpSchema(
        spec.name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[formal(t) for t in spec.inputs],
        outputs=[formal(t, "_out") for t in spec.outputs],
        type_constraints=[("T", _COMPUTE_TYPES, "the activation dtype")],
        attributes=[OpSchema.Attribute(a, OpSchema.AttrType.STRING, required=False) for a in PLUGIN_ATTRIBUTES],
    )
    schema.set_type_and_shape_inference_function(functools.partial(_infer_outputs, spec))
    return schema


def _type_string(dtype: str) -> str:
    """What an op schema calls an element type, such as "tensor(float)"; "T" is the type it computes in."""
    return f"tensor({TensorProto.DataType.Name(DTYPES[dtype].onnx).lower()})" if dtype in DTYPES else "T"


def _infer_outputs(spec: OpSpec, context: Any) -> None:
    """A cache comes out as it went in; all else has the dtype and the shape that the spec says."""
    types = [context.get_input_type(i).tensor_type for i in range(len(spec.inputs))]
    shapes = [[d.dim_value or d.dim_param or None for d in kind.shape.dim] for kind in types]
    aliases = dict(spec.aliases)
    for output in range(len(spec.outputs)):
        if output in aliases:
            context.set_output_type(output, context.get_input_type(aliases[output]))
            continue
        dtype = infer_dtype(spec, output, [str(kind.elem_type) for kind in types])
        element_type = DTYPES[dtype].onnx if dtype in DTYPES else int(dtype)
        dims: Any = infer_shape(spec, output, shapes)
        context.set_output_type(output, helper.make_tensor_type_proto(element_type, dims))


# --- torch operators to nodes


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export's `custom_translation_table`: each torch op becomes its node of the `longtake` domain."""
    register_schemas()
    return {torch_op(name): _translation(op.spec) for name, op in all_ops().items()} | translations()


def _translation(spec: OpSpec) -> Callable[..., Any]:
    op = getattr(Opset(DOMAIN, DOMAIN_VERSION), spec.name)

    def translate(*inputs: Any) -> Any:
        return op(*inputs, **PLUGIN_ATTRIBUTES)

    named = [inspect.Parameter(t.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for t in spec.inputs]
    translate.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]  # the exporter matches by it
    return translate


# --- function bodies


def attach_functions(model: ModelProto) -> None:
    """Add the body of every `longtake` op that the model uses and has none for yet, in place; a repeated call is safe.

    Raises:
        LongtakeError: the domain has no such op, or the shapes of its cache are not known or differ within the model.
    """
    present = {f.name for f in model.functions if f.domain == DOMAIN}
    used = list(dict.fromkeys(node.op_type for node in model.graph.node if node.domain == DOMAIN))
    if not used:
        return
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    missing = [name for name in used if name not in present]
    model.functions.extend(function_protos(missing, dims_from_graph(model.graph), opset=opset))


def function_protos(ops: Iterable[str], dims: Mapping[str, int], *, opset: int = DEFAULT_OPSET) -> list[FunctionProto]:
    """The FunctionProto of each named op for these sizes: S, L, H and D (none for weights and linears)."""
    return [_function_proto(name, tuple(sorted(dims.items())), opset) for name in ops]


def dims_from_graph(graph: GraphProto) -> dict[str, int]:
    """The sizes (S, L, H, D) of the caches that the graph's `longtake` nodes work on, from the declared shapes."""
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    dims: dict[str, int] = {}
    for node in graph.node:
        if node.domain == DOMAIN:
            for formula, size in _sizes(node, shapes):
                letter, _, divisor = formula.partition("/")
                _bind(dims, letter, size * int(divisor or 1), node)
    return dims


def _sizes(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int]]:
    """(dimension formula, size) of a node's inputs where known; 0 stands for an unknown size."""
    spec = _op(node.op_type).spec
    for tensor, name in zip(spec.inputs, node.input):
        for formula, size in zip(tensor.shape, shapes.get(name, ())):
            if size and formula[0].isalpha() and formula[0] not in (*_DYNAMIC, *spec.free) and "*" not in formula:
                yield formula, size


def _bind(dims: dict[str, int], letter: str, size: int, node: NodeProto) -> None:
    if dims.setdefault(letter, size) != size:
        what, got = f"the custom ops of one model must agree on {letter}", f"{size} at node {node.name or node.op_type}"
        expected, fix = dims[letter], "export layers of different sizes into different models"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)


def _op(name: str) -> Op:
    if name not in all_ops():
        raise LongtakeError(f"no op of the domain {DOMAIN!r} is named {name!r}", expected=", ".join(all_ops()))
    return all_ops()[name]


@functools.lru_cache(maxsize=256)  # more than there are ops, a few kilobytes each
def _function_proto(name: str, dims: tuple[tuple[str, int], ...], opset: int) -> FunctionProto:
    """Export the reference of one op and wrap it: fp32 inside, the activation's dtype outside."""
    spec = _op(name).spec
    graph = _exported_reference(_op(name), dict(dims), opset)
    compute = [t.name for t in spec.inputs if t.dtype == "compute"]
    names = {g.name: f"{t.name}.fp32" if t.name in compute else t.name for t, g in zip(spec.inputs, graph.input)}
    nodes = [helper.make_node("Cast", [t], [f"{t}.fp32"], to=TensorProto.FLOAT) for t in compute]
    nodes += [helper.make_node("Constant", [], [f"body.{t.name}"], value=t) for t in graph.initializer]
    nodes += [_renamed(node, names) for node in graph.node]
    outputs = [f"{t.name}_out" for t in spec.outputs]
    for tensor, output, exported in zip(spec.outputs, outputs, graph.output):
        like = compute[:1] if tensor.dtype == "compute" else []
        nodes.append(helper.make_node("CastLike" if like else "Identity", [f"body.{exported.name}", *like], [output]))
    inputs = [t.name for t in spec.inputs]
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, imports, list(PLUGIN_ATTRIBUTES))


def _renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy without metadata; inputs of the graph are renamed by `names`, every other value starts with `body.`."""
    clean = NodeProto()
    clean.CopyFrom(node)
    del clean.metadata_props[:]
    clean.doc_string = ""
    clean.input[:] = [names.get(name, f"body.{name}") if name else "" for name in node.input]
    clean.output[:] = [f"body.{name}" if name else "" for name in node.output]
    return clean


class Variadic(nn.Module):
    """A network or reference with its inputs as one list, so that all of them export through the same lines."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(*inputs)


def _exported_reference(op: Op, dims: Mapping[str, int], opset: int) -> GraphProto:
    """The reference as a graph, its inputs in the order of the spec."""
    spec = op.spec
    letters = {letter for t in spec.inputs for formula in t.shape for letter in formula if letter.isalpha()}
    unknown = sorted(letters - {*dims, *_DYNAMIC, *spec.free})
    if unknown:
        what, got = f"the sizes of {spec.name} are not known", dict(dims)
        expected, fix = f"also {', '.join(unknown)}", "declare the shapes of the cache inputs in the graph"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    with torch.no_grad(), quiet_exporter():
        program: Any = torch.onnx.export(
            Variadic(op.reference).eval(),
            tuple(_example(t, spec, dims) for t in spec.inputs),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(tuple(_dynamic_dims(t, spec) for t in spec.inputs),),
            verbose=False,
        )
    return program.model_proto.graph


def _example(tensor: TensorSpec, spec: OpSpec, dims: Mapping[str, int]) -> Tensor:
    sizes = {"W": 3, "N": 48, "K": 96, "T": 24, "Y": 5, "X": 6, "C": 32, **dims, **dict.fromkeys(spec.free, 5)}
    sizes |= {letter: min(sizes[letter], most - 1) for letter, most in spec.most}
    return torch.zeros(shape_of(tensor, sizes), dtype=torch_dtype(tensor, "fp32"))


def _dynamic_dims(tensor: TensorSpec, spec: OpSpec) -> dict[int, Any]:
    """torch.export dimensions; K counts in blocks of 16, of which K/2 is eight times as many."""
    frames = 3 if any("T-2" in t.shape for t in spec.outputs) else 1
    blocks = torch.export.Dim("K_16", min=1, max=1 << 20)
    known = {"K/16": blocks, "K/2": 8 * blocks}
    most = dict(spec.most)
    known |= {
        letter: torch.export.Dim(f"{letter}_", min=1, max=most.get(letter, 1 << 20))  # N alone is a function of sympy
        for letter in (*_DYNAMIC, *spec.free)
    }
    known["T"] = torch.export.Dim("T_", min=frames, max=most.get("T", 1 << 20))
    known |= {"T-2": torch.export.Dim.AUTO, "4*N": 4 * known["N"]}
    known |= {f"2*{letter}": 2 * known[letter] for letter in "TYX"}
    return {i: known[formula] for i, formula in enumerate(tensor.shape) if formula in known}


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Mute the exporter's warnings about itself and about packages that are not needed; read its translations once."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), read_once():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


register_schemas()
