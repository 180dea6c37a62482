"""Lowering of a plain bf16 ONNX graph to a precision: which nodes a quantized Linear becomes.

The plain graph has one `Gemm(x, W, b, transB=1)` a Linear, W named by its state-dict key. After lowering:

w4a16   y = Cast_bf16( Cast_f32( Gemm(x, nvfp4_dequantize(values, scales)) ) * g ) + b
        values, scales INT8 (two E2M1 codes a byte, one E4M3 byte a block of 16); the product E2M1 x E4M3 is exact in bf16
nvfp4   y = Gemm( DQ(DQ(TRT_FP4DynamicQuantize(x))), DQ(DQ(W)), b )
        W as FLOAT4E2M1 and FLOAT8E4M3FN initializers; x quantized with its *calibrated* amax, block scales at run time
fp8     see lower_fp8

Where a library runs the linears (`library`), the products become ops of ours, so that the graph is cut at them. In bf16
they take the bias, and the GELU that follows, which the library computes on the way out. In w4a16 they do as well, and
nvfp4_dequantize_scaled unpacks the weight right before each, g included: torch's bf16 products take no factor that lies on
the device. For fp8 see lower_fp8_library.

Lowering touches the graph only: packed weights go in as references (name, type, shape), and `packed_weight` makes their
content from one weight at a time, when the files are written. So a graph of any size is lowered without its weights.

g = amax / (6 * 448) for activations and, unless the checkpoint says that its weights were trained or packed by another
rule (`plugins.nvfp4.weight_format`), for weights: codes and scales of static_6 in ModelOpt's order equal ModelOpt's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.export.lower_fp8 import lower_fp8, packed_fp8_weight
from longtake.export.lower_fp8_library import Fp8LibraryLowering
from longtake.export.rewriter import Rewriter, is_tanh_gelu, linear_name
from longtake.plugins.nvfp4.reference import BLOCK, PLACEHOLDER_AMAX, tensor_scale
from longtake.plugins.nvfp4.weight_format import STATIC_6, WeightFormat
from longtake.plugins.spec import DOMAIN, PLUGIN_ATTRIBUTES

ACTIVATION_DOMAIN = "trt"
ACTIVATION_OP = "TRT_FP4DynamicQuantize"
WEIGHT_OP, SCALED_WEIGHT_OP = "nvfp4_dequantize", "nvfp4_dequantize_scaled"


Amax = Mapping[str, Mapping[str, float]]
CALIBRATED = {"w4a16": (), "nvfp4": ("weight", "input"), "fp8": ("input",)}  # which amax a precision reads


def lower(
    model: onnx.ModelProto, precision: str, linears: Collection[str], amax: Amax | None, library: bool = False
) -> list[str]:
    """Lower, in place, every Linear of `model` named in `linears`; return those whose weights are packed.

    "bf16" packs nothing, and changes nothing unless `library`.

    Args:
        model: plain bf16 export; weights named by state-dict key, their content is not needed.
        precision: "bf16", "w4a16" (weight amax = max |W|), "nvfp4" (both amax as calibrated under training) or "fp8"
            (activation amax as calibrated, weight scales from the weight itself).
        linears: state-dict prefixes, "blocks.0.ffn.2".
        amax: linear name -> {"input": amax of the activation, "weight": amax of the weight}; see CALIBRATED.
            None stands for not known: the graph gets placeholders.
        library: whether the products become ops that a library runs; not in "nvfp4".

    Raises:
        LongtakeError: a Linear is not a Gemm with a transposed weight, or has no usable amax.
    """
    if library and precision in ("bf16", "w4a16"):
        return _library_linears(model, linears, packed=precision == "w4a16")
    if precision == "bf16":
        return []
    rewriter = Rewriter(model)
    named = {linear_name(node): node for node in model.graph.node if linear_name(node) in linears}
    for name, node in named.items():
        _require_linear(node, name)
    known = dict.fromkeys(named, PLACEHOLDER_AMAX)
    if CALIBRATED[precision] and amax is not None:
        known = {name: _calibrated(amax, name, precision)["input"] for name in named}
    if library:
        Fp8LibraryLowering(rewriter, named, known).run()
    for node in () if library else model.graph.node:
        if (name := linear_name(node)) in named:
            LOWERINGS[precision](rewriter, node, known[name])
        else:
            rewriter.nodes.append(node)
    rewriter.finish()
    _import_domains(model, DOMAIN if library else {"w4a16": DOMAIN, "nvfp4": ACTIVATION_DOMAIN}.get(precision))
    return list(named)


def _library_linears(model: onnx.ModelProto, linears: Collection[str], packed: bool) -> list[str]:
    """Every Linear named in `linears` as a linear_bf16, or as a linear_gelu_bf16 where a GELU (tanh) alone reads it; `packed`:
    its weight unpacked right before it. Returns those whose weights are packed."""
    rewriter, taken, unpacked = Rewriter(model), set(), list[str]()
    readers = Counter(name for node in model.graph.node for name in node.input)
    gelus = {n.input[0]: n for n in model.graph.node if is_tanh_gelu(n) and readers[n.input[0]] == 1}
    for node in model.graph.node:
        if linear_name(node) not in linears:
            if node.output[0] not in taken:
                rewriter.nodes.append(node)
            continue
        _require_linear(node, name := linear_name(node))
        x, weight, *bias = node.input
        if packed:
            weight = _unpacked_weight(rewriter, weight, SCALED_WEIGHT_OP, _packed_initializers(rewriter, weight, False))
            unpacked.append(name)
        gelu = gelus.get(node.output[0])
        op, output = ("linear_gelu_bf16", gelu.output[0]) if gelu else ("linear_bf16", node.output[0])
        taken |= {output} if gelu else set()
        rewriter.node(op, [x, weight, *bias], output, domain=DOMAIN, **PLUGIN_ATTRIBUTES)
    rewriter.finish()
    _import_domains(model, DOMAIN)
    return unpacked


def packed_weight(
    precision: str, name: str, weight: Tensor, amax: Amax, form: WeightFormat = STATIC_6
) -> dict[str, Tensor]:
    """Content of the initializers that `lower` put in place of Linear `name`'s weight, by initializer name.

    Args:
        weight: [N, K] as trained (fp32, or bf16 as published): codes are found before anything is rounded.
        amax: as for `lower`.
        form: rule, order and scale layout of 4-bit weights, those the checkpoint was trained or packed with.

    Returns:
        CPU tensors of as many bytes as the initializer takes; 4-bit and 8-bit floats are given as uint8.
    """
    known = _calibrated(amax, name, precision)
    if precision == "fp8":
        return packed_fp8_weight(name, weight, known["input"])
    packed = form.pack(weight, form.amax_of(weight, known.get("weight")))
    return {
        f"{name}.weight.values": packed.values,
        f"{name}.weight.scales": packed.scales.view(torch.uint8),
        f"{name}.weight.scale": torch.tensor(tensor_scale(float(packed.amax), form.rule), dtype=torch.float32),
    }


def _calibrated(amax: Amax, name: str, precision: str) -> dict[str, float]:
    """The amax of a linear that `precision` reads, by side, all positive and finite."""
    entry, sides = amax.get(name, {}), CALIBRATED[precision]
    known = {side: entry.get(side, 0.0) for side in sides}
    if not all(0.0 < value < float("inf") for value in known.values()):
        raise LongtakeError(
            f"no calibrated amax for {name}",
            got=dict(entry) or "nothing",
            expected=f"a positive amax of its {' and of its '.join(sides)}",
            fix="train with --precision nvfp4, measure it (longtake convert --calibrate), or export a w4a16 or bf16 recipe",
        )
    return known


def _require_linear(node: NodeProto, name: str) -> None:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
    if node.op_type != "Gemm" or attributes.get("transB") != 1 or attributes.get("transA", 0) or not plain:
        raise LongtakeError(
            f"cannot lower {name}",
            got=f"{node.op_type} {attributes}",
            expected="Gemm with transB=1: a Linear applied to a 2-D activation",
            fix="flatten the activation to [tokens, features] before this Linear",
        )


def _packed_initializers(rewriter: Rewriter, name: str, fp4: bool) -> tuple[str, str, str]:
    """Refer to the packed weight as (FLOAT4E2M1 [N,K], FLOAT8E4M3FN) or (INT8 [N,K/2], INT8), and its fp32 scale."""
    rows, columns = rewriter.weight_shape(name)
    types = (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN) if fp4 else (TensorProto.INT8, TensorProto.INT8)
    return (
        rewriter.reference(f"{name}.values", types[0], [rows, columns if fp4 else columns // 2]),
        rewriter.reference(f"{name}.scales", types[1], [rows, columns // BLOCK]),
        rewriter.reference(f"{name}.scale", TensorProto.FLOAT, []),
    )


def _weight_only(rewriter: Rewriter, gemm: NodeProto, input_amax: float) -> None:
    name, out = gemm.input[1], gemm.output[0]
    *packed, scale = _packed_initializers(rewriter, name, fp4=False)
    weight = _unpacked_weight(rewriter, name, WEIGHT_OP, packed)
    product = rewriter.node("Gemm", [gemm.input[0], weight], f"{out}.unscaled", transB=1)
    rewriter.scale_and_add(product, scale, gemm.input[2:], out)


def _unpacked_weight(rewriter: Rewriter, name: str, op: str, packed: Sequence[str]) -> str:
    return rewriter.node(op, list(packed), f"{name}.dequantized", domain=DOMAIN, **PLUGIN_ATTRIBUTES)


def _weight_and_activation(rewriter: Rewriter, gemm: NodeProto, input_amax: float) -> None:
    name, out = gemm.input[1], gemm.output[0]
    values, scales, scale = _packed_initializers(rewriter, name, fp4=True)
    weight = _dequantize(rewriter, values, scales, scale, name)
    activation = _quantized_activation(rewriter, gemm.input[0], input_amax)
    rewriter.node("Gemm", [activation, weight, *gemm.input[2:]], out, transB=1)


def _quantized_activation(rewriter: Rewriter, x: str, amax: float) -> str:
    """Quantize and dequantize activation `x`; linears that share x and its amax (q, k, v) share the nodes."""
    if (x, amax) in rewriter.shared:
        return rewriter.shared[x, amax]
    base = f"{x}.q{sum(tensor == x for tensor, _ in rewriter.shared)}"
    scale = rewriter.scalar(f"{base}.scale", tensor_scale(amax))
    values, scales = f"{base}.values", f"{base}.scales"
    attributes: dict[str, Any] = {"axis": -1, "block_size": BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
    attributes |= {"name": f"{base}/{ACTIVATION_OP}", "domain": ACTIVATION_DOMAIN}
    rewriter.nodes.append(helper.make_node(ACTIVATION_OP, [x, scale], [values, scales], **attributes))
    rewriter.shared[x, amax] = _dequantize(rewriter, values, scales, scale, base)
    return rewriter.shared[x, amax]


def _dequantize(rewriter: Rewriter, values: str, scales: str, scale: str, base: str) -> str:
    """DQ(scales) -> fp32, DQ(values) -> fp32, Cast -> bf16: the types TensorRT fuses into its FP4 kernels."""
    wide = rewriter.node("DequantizeLinear", [scales, scale], f"{base}.scales_f32")
    dense = rewriter.node("DequantizeLinear", [values, wide], f"{base}.f32", axis=-1, block_size=BLOCK)
    return rewriter.node("Cast", [dense], f"{base}.bf16", to=TensorProto.BFLOAT16)


def _import_domains(model: onnx.ModelProto, domain: str | None) -> None:
    if domain and domain not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(domain, 1))


LOWERINGS: dict[str, Callable[[Rewriter, NodeProto, float], None]] = {
    "w4a16": _weight_only,
    "nvfp4": _weight_and_activation,
    "fp8": lower_fp8,
}
