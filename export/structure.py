"""The structural check of an exported file: bindings, custom ops, bits per weight, nothing left unlowered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from longtake.dtypes import DTYPES
from longtake.errors import IntegrityError
from longtake.export.lower import ACTIVATION_DOMAIN, SCALED_WEIGHT_OP, WEIGHT_OP
from longtake.export.rewriter import linear_name
from longtake.formats.onnx_file import data_sizes, read_onnx, tensor_bytes
from longtake.plugins import exchange
from longtake.plugins.cache_format import cache_tensors
from longtake.plugins.registry import all_ops, op_named
from longtake.plugins.spec import DOMAIN, PLUGIN_ATTRIBUTES
from longtake.training.models.network_spec import Binding, NetworkSpec

FOUR_BITS, EIGHT_BITS = ("values", "scales"), ("values", "scale")  # the tensors a packed weight consists of
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Expected:
    """What an exported network must hold.

    linears: name -> (N, K) of each Linear lowered to 4 or 8 bits. layers: transformer layers with a K/V cache (0 if none).
    library: whether the linears are ops that a library runs. streams: op name -> nodes of a VAE decoder. ranks: how many
    share it; the graph of one of several runs cut or not at all, so its ops have no bodies.
    """

    spec: NetworkSpec
    precision: str
    cache: str
    layers: int = 0
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    library: bool = False
    streams: Mapping[str, int] = field(default_factory=dict)
    ranks: int = 1

    @property
    def custom_ops(self) -> Counter[str]:
        """How many nodes of each op of the `longtake` domain there must be."""
        if self.spec.ops:
            unpacked = Counter({WEIGHT_OP: len(self.linears)}) if self.precision == "w4a16" else Counter()
            return Counter(dict(self.spec.ops)) + unpacked
        slots = set(cache_tensors(self.cache))
        ops = Counter({op.name: self.layers for op in all_ops().values() if slots <= set(op.spec.inputs)})
        ops["qk_norm_rope"] = self.layers
        if self.precision == "w4a16":
            ops[SCALED_WEIGHT_OP if self.library else WEIGHT_OP] = len(self.linears)
        if self.library and self.layers:
            ops += self._library_ops()
        return +ops + Counter(self.streams)

    def _library_ops(self) -> Counter[str]:
        """The linears (q, k, v, o, cross-attention's q and o, the FFN's two) and what lies between them, of all layers."""
        layers, fp8 = self.layers, self.precision == "fp8"
        norms = {"norm_modulate": 1, "gated_norm_affine": layers, "residual_norm_modulate": layers}
        norms["gated_norm_modulate"] = layers - 1  # the last block's end is the head's
        linears = {"linear_bf16": 7 * layers, "linear_gelu_bf16": layers}
        if fp8:  # what follows the last block is the engine's: it takes the whole output
            norms = {op_named(name).quantized: n for name, n in norms.items()}
            linears = {"linear_fp8": 4 * layers - 1, "linear_rows_fp8": 4 * layers + 1}
            linears |= {"quantize_fp8": 2 * layers, "gelu_quantize_fp8": layers}
        return Counter({**norms, **linears, "rms_norm": layers, "cross_attention": layers})

    def bits_per_weight(self, columns: int) -> float:
        """Bits of one weight with its share of the scales: of a block of 16 in E4M3, or of a row in fp32."""
        return 8 + 32 / columns if self.precision == "fp8" else 4.5


def check_structure(path: Path, expected: Expected, skeleton: bool = False) -> None:
    """Check one exported file; its weights are not read, and if it is a `skeleton` they need not be there.

    Raises:
        LongtakeError: the file is missing.
        IntegrityError: it is damaged or differs from `expected`; the message names the file and the difference.
    """
    model = read_onnx(path, "none")
    if not skeleton:
        data_sizes(model, path)
    try:
        onnx.checker.check_model(_weights_as_inputs(model))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise _broken(path, "is not valid ONNX", str(error)[:300], "a graph that onnx.checker accepts") from None
    _check_bindings(path, "inputs", model.graph.input, expected.spec.inputs)
    _check_bindings(path, "outputs", model.graph.output, expected.spec.outputs)
    _check_domains(path, model, expected)
    _check_custom_ops(path, model, expected)
    _check_weights(path, model, expected)


def _weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph for onnx.checker, which would insist on the data file being there."""
    view = onnx.ModelProto()
    view.CopyFrom(model)
    kept = [t for t in view.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    outside = [t for t in view.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    view.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside)
    del view.graph.initializer[:]
    view.graph.initializer.extend(kept)
    return view


def _broken(path: Path, what: str, got: object, expected: object) -> IntegrityError:
    return IntegrityError(f"{path} {what}", got=got, expected=expected, fix="run `longtake export --force`")


def _check_bindings(
    path: Path, kind: str, values: Iterable[onnx.ValueInfoProto], bindings: tuple[Binding, ...]
) -> None:
    got = [_binding(value) for value in values]
    wanted = [(b.name, DTYPES[b.dtype].onnx, tuple(b.shape)) for b in bindings]
    for have, want in zip(got, wanted):
        if have != want:
            raise _broken(path, f"has other {kind} than the engine spec", _shown(have), _shown(want))
    if len(got) != len(wanted):
        raise _broken(path, f"has another number of {kind} than the engine spec", len(got), len(wanted))


def _binding(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    """(name, ONNX dtype, shape); a dynamic dimension is its name."""
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return value.name, tensor.elem_type, shape


def _shown(binding: tuple[str, int, tuple[int | str, ...]]) -> str:
    name, dtype, shape = binding
    return f"{name} {TensorProto.DataType.Name(dtype)} {list(shape)}"


def _check_domains(path: Path, model: onnx.ModelProto, expected: Expected) -> None:
    """Nodes are standard, ours or (nvfp4) TensorRT's: a leftover quantizer or aten node is of another domain."""
    known = {*STANDARD_DOMAINS, DOMAIN, *([ACTIVATION_DOMAIN] if expected.precision == "nvfp4" else [])}
    known |= {exchange.DOMAIN} if expected.ranks > 1 else set()
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain not in known})
    if foreign:
        raise _broken(path, "holds nodes that were not lowered", ", ".join(foreign), f"domains {sorted(known)}")
    try:
        for node in model.graph.node:
            if node.domain in STANDARD_DOMAINS:
                onnx.defs.get_schema(node.op_type)
    except onnx.defs.SchemaError:
        raise _broken(path, "holds an unknown op", node.op_type, "ops of the ONNX standard") from None


def _check_custom_ops(path: Path, model: onnx.ModelProto, expected: Expected) -> None:
    wanted = expected.custom_ops
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    found = Counter(node.op_type for node in nodes)
    if found != wanted:
        raise _broken(path, "holds another number of custom ops", dict(found), dict(wanted))
    bodies = {function.name for function in model.functions if function.domain == DOMAIN}
    exchanges = Counter(node.op_type for node in model.graph.node if node.domain == exchange.DOMAIN)
    if expected.ranks > 1 and expected.layers and set(exchanges.values()) != {expected.layers}:
        raise _broken(path, "holds another number of exchanges", dict(exchanges), f"{expected.layers} of each")
    if expected.ranks == 1 and not set(wanted) <= bodies:
        raise _broken(path, "lacks function bodies", sorted(bodies), sorted(wanted))
    for node in nodes:
        plugin = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values = {key: plugin.get(key) for key in PLUGIN_ATTRIBUTES}
        got = {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}
        if got != PLUGIN_ATTRIBUTES:
            what = f"names no plugin for node {node.name} (TensorRT would inline it silently)"
            raise _broken(path, what, got, PLUGIN_ATTRIBUTES)


def _check_weights(path: Path, model: onnx.ModelProto, expected: Expected) -> None:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    left = [linear_name(n) for n in model.graph.node if n.op_type == "Gemm" and linear_name(n) in expected.linears]
    if left:
        raise _broken(path, "holds linears that were not lowered", left[:4], f"{expected.precision} weights")
    for name, (rows, columns) in expected.linears.items():
        suffixes = EIGHT_BITS if expected.precision == "fp8" else FOUR_BITS
        parts = [tensors.get(f"{name}.weight.{part}") for part in suffixes]
        size = sum(tensor_bytes(part) for part in parts if part is not None)
        bits = 8 * size / (rows * columns)
        wanted = expected.bits_per_weight(columns)
        if None in parts or bits != wanted:
            raise _broken(path, f"does not hold {name} in {expected.precision}", f"{bits} bits a weight", wanted)
    quantized = [n for n in model.graph.node if n.domain == ACTIVATION_DOMAIN or n.op_type == "QuantizeLinear"]
    _check_activations(path, quantized, tensors, expected)


def _check_activations(
    path: Path, quantized: list[NodeProto], tensors: Mapping[str, TensorProto], expected: Expected
) -> None:
    """TensorRT wants each activation's per-tensor scale as an initializer: without, it refuses or multiplies in bf16."""
    own = expected.library and expected.layers  # counted with the custom ops
    if expected.precision in ("nvfp4", "fp8") and expected.linears and not quantized and not own:
        raise _broken(path, "quantizes no activations", 0, "one quantizer an input of a quantized linear")
    for node in quantized:
        if node.input[1] not in tensors:
            raise _broken(path, f"computes the scale of {node.name}", node.input[1], "a calibrated initializer")
