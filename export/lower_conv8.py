"""Convolutions of a VAE decoder in 8-bit codes: which nodes of a graph of ops become which.

    codes = norm_silu_extend, stream_extend or encode* with a factor, whichever makes what the convolution reads
    y     = conv_*_fp8 or _int8 (codes, codes of W, a scale a channel, bias (, residual))

An upsampling in front of a convolution leaves its place to encode* and the convolution to one that is folded (conv8).
The histories become codes, so the graph's caches are INT8. The network of a stream's first step computes in bf16 and ends with
a node a history that encodes it, so that the later steps find what they expect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.export.rewriter import Rewriter
from longtake.plugins import exchange
from longtake.plugins.codes import factor_of
from longtake.plugins.exchange import HALO
from longtake.plugins.registry import coded_op, op_named
from longtake.plugins.shapes import shape_of
from longtake.plugins.spec import DOMAIN, PLUGIN_ATTRIBUTES
from longtake.training.models.conv_calibration import UNKNOWN_PEAK, ConvCalibration
from longtake.training.models.wan.vae_codes import CodedConv


@dataclass(frozen=True)
class ConvCodes:
    """chosen: codes by the convolution's name. calibration: None for a graph without weights. caches: the convolution whose
    codes each of the decoder's caches holds, "" for one in bf16."""

    chosen: Mapping[str, str] = field(default_factory=dict)
    calibration: ConvCalibration | None = None
    caches: tuple[str, ...] = ()

    def peak(self, name: str) -> float:
        """The largest magnitude that a convolution's input had."""
        return self.calibration.inputs[name].peak if self.calibration else UNKNOWN_PEAK

    def content(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Content of the initializers that stand for a convolution's weight, by initializer name."""
        coded = CodedConv(weight, self.chosen[name], self.peak(name))
        return {f"{name}.weight.codes": coded.weight, f"{name}.weight.scale": coded.scale.to(torch.float32)}


def lower_convs(model: onnx.ModelProto, codes: ConvCodes, first: bool) -> list[str]:
    """Lower the convolutions of a decoder's graph in place; the names of those whose weights are codes now.

    first: the graph is a stream's first step.

    Raises:
        LongtakeError: a chosen convolution is not in the graph, or something else reads what it reads.
    """
    if not codes.chosen:
        return []
    rewriter = Rewriter(model)
    if first:
        _encode_caches(rewriter, codes)
        found: list[str] = []
    else:
        found = _lower_steady(rewriter, codes)
    rewriter.finish()
    _retype_caches(model, codes)
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return found


def _factor(rewriter: Rewriter, codes: ConvCodes, name: str) -> str:
    value = np.array([factor_of(codes.peak(name), codes.chosen[name])], np.float32)
    return rewriter.tensor(
        numpy_helper.from_array(value, f"{name}_factor".replace(".", "_"))
    )  # a dot is in names of parameters only


def _lower_steady(rewriter: Rewriter, codes: ConvCodes) -> list[str]:
    halos = {n.output[0]: n.input[0] for n in rewriter.graph.node if n.domain == exchange.DOMAIN and n.op_type == HALO}
    reads = {node.input[0]: node for node in rewriter.graph.node if _name(node) in codes.chosen}
    convs = {halos.get(name, name): node for name, node in reads.items()}  # a rank's halo lies between
    names = {_name(node) for node in convs.values()}
    if missing := sorted(codes.chosen.keys() - names):
        raise LongtakeError(
            "convolutions to be run in codes are not ops of the graph",
            got=missing[:4],
            expected="vae_ops: library",
            fix="set vae_conv: bf16",
        )
    types = {value.name: value for value in rewriter.graph.value_info}
    for node in rewriter.graph.node:
        conv = convs.get(node.output[0]) if node.domain == DOMAIN else None
        if conv is not None:  # what makes the codes
            name, op = _name(conv), op_named(node.op_type)
            if bool(op.repeats) != bool(op_named(conv.op_type).in_codes):
                what, got = "only 1x3x3 convolutions behind an upsampling are folded", f"{name} behind {node.op_type}"
                raise LongtakeError(what, got=got, fix="set vae_conv: bf16")
            inputs = list(node.input)
            at = len(inputs) - 1 if op.extends_stream else len(inputs)
            inputs.insert(at, _factor(rewriter, codes, name))
            _op(rewriter, coded_op(node.op_type, codes.chosen[name]), inputs, list(node.output))
            for made in node.output:
                if made in types:
                    types[made].type.tensor_type.elem_type = TensorProto.INT8
                    for size in types[made].type.tensor_type.shape.dim[1:3] if op.repeats else ():
                        size.dim_value //= 2  # the frame stays small
        elif _name(node) in names:
            name = _name(node)
            op_type, plain = coded_op(node.op_type, codes.chosen[name]), rewriter.weight_shape(node.input[1])
            shapes = [list(shape_of(t, {"N": plain[0], "C": plain[1]})) for t in op_named(op_type).spec.inputs[1:3]]
            stored = rewriter.reference(f"{name}.weight.codes", TensorProto.INT8, shapes[0])
            scale = rewriter.reference(f"{name}.weight.scale", TensorProto.FLOAT, shapes[1])
            _op(rewriter, op_type, [node.input[0], stored, scale, *node.input[2:]], list(node.output))
        else:
            rewriter.nodes.append(node)
    for name in reads.keys() & halos.keys() & types.keys():
        types[name].type.tensor_type.elem_type = TensorProto.INT8
    _require_alone(rewriter, convs)
    return sorted(names)


def _require_alone(rewriter: Rewriter, convs: Mapping[str, NodeProto]) -> None:
    """Codes must have one reader, which knows what they are."""
    for node in rewriter.nodes:
        op = op_named(node.op_type) if node.domain == DOMAIN else None
        for name in set(node.input) & convs.keys():
            if node.op_type != HALO and (op is None or not (op.kernel_size and op.codes)):
                what, got = "a convolution's input is read elsewhere, too", node.name
                expected, fix = name, "set vae_conv: bf16"
                raise LongtakeError(what, got=got, expected=expected, fix=fix)


def _encode_caches(rewriter: Rewriter, codes: ConvCodes) -> None:
    outputs = {f"vae_cache_{i}_out": name for i, name in enumerate(codes.caches) if name in codes.chosen}
    plain = {out: f"{out}.plain" for out in outputs}
    for node in rewriter.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = plain.get(name, name)
        rewriter.nodes.append(node)
    for value in [v for v in rewriter.graph.output if v.name in plain]:
        kept = onnx.ValueInfoProto()
        kept.CopyFrom(value)
        kept.name = plain[value.name]
        rewriter.graph.value_info.append(kept)
    for out, name in outputs.items():
        _op(rewriter, f"encode_{codes.chosen[name]}", [plain[out], _factor(rewriter, codes, name)], [out])


def _retype_caches(model: onnx.ModelProto, codes: ConvCodes) -> None:
    coded = {
        f"vae_cache_{i}{end}" for i, name in enumerate(codes.caches) if name in codes.chosen for end in ("", "_out")
    }
    for value in (*model.graph.input, *model.graph.output):
        if value.name in coded:
            value.type.tensor_type.elem_type = TensorProto.INT8


def _op(rewriter: Rewriter, name: str, inputs: list[str], outputs: list[str]) -> None:
    rewriter.nodes.append(
        onnx.helper.make_node(name, inputs, outputs, name=f"{outputs[0]}/{name}", domain=DOMAIN, **PLUGIN_ATTRIBUTES)
    )


def _name(node: NodeProto) -> str:
    """The name of the convolution that a node of ours is, "" for any other."""
    if node.domain != DOMAIN or not op_named(node.op_type).kernel_size:
        return ""
    return node.input[1].removesuffix(".weight")
