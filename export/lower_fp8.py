"""A Linear in 8-bit floats: which nodes it becomes so that TensorRT multiplies in FP8, and its weight's codes.

fp8     y = Cast_bf16( Cast_f32( Gemm(DQ(Q(x * 448 / amax, 1), 1), DQ(codes, 1)) ) * scale ) + b
        codes E4M3 [N, K], one scale a row of W, times the activation's: scale fp32 [N]

TensorRT fuses Q, DQ and Gemm into an FP8 kernel only if the scales of Q and DQ are constants; given as inputs it
dequantizes and multiplies in bf16. But a plan that serves all layers takes what differs between them as inputs. So Q
and DQ have the constant scale 1, and the true scales are multiplied before and after, where they cost no kernel of
their own: TensorRT adds the bias in a kernel behind the Gemm anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from longtake.plugins.fp8 import multiplier, quantized_rows

if TYPE_CHECKING:
    from longtake.export.rewriter import Rewriter

ONE = "fp8.one"


def packed_fp8_weight(name: str, weight: Tensor, input_amax: float) -> dict[str, Tensor]:
    """Content of the initializers that `lower_fp8` puts in place of Linear `name`'s weight [N, K]; codes as uint8."""
    codes, scales = quantized_rows(weight.cpu())
    return {
        f"{name}.weight.values": codes.view(torch.uint8).contiguous(),
        f"{name}.weight.scale": scales / multiplier(torch.tensor(input_amax)),
    }


def lower_fp8(rewriter: Rewriter, gemm: NodeProto, input_amax: float) -> None:
    """Replace one `Gemm(x, W, b, transB=1)`; `input_amax` is the calibrated amax of x."""
    name, out = gemm.input[1], gemm.output[0]
    rows, columns = rewriter.weight_shape(name)
    codes = rewriter.reference(f"{name}.values", TensorProto.FLOAT8E4M3FN, [rows, columns])
    scale = rewriter.reference(f"{name}.scale", TensorProto.FLOAT, [rows])
    one = rewriter.scalar(ONE, 1.0)
    weight = _dequantized(rewriter, codes, one, name)
    activation = _quantized_activation(rewriter, gemm.input[0], one, input_amax)
    product = rewriter.node("Gemm", [activation, weight], f"{out}.unscaled", transB=1)
    rewriter.scale_and_add(product, scale, gemm.input[2:], out)


def _quantized_activation(rewriter: Rewriter, x: str, one: str, amax: float) -> str:
    """Quantize and dequantize activation `x`; linears that share x and its amax (q, k, v) share the nodes."""
    codes = _activation_codes(rewriter, x, one, amax)
    if (codes, amax) not in rewriter.shared:
        rewriter.shared[codes, amax] = _dequantized(rewriter, codes, one, codes.removesuffix(".values"))
    return rewriter.shared[codes, amax]


def _activation_codes(rewriter: Rewriter, x: str, one: str, amax: float) -> str:
    """E4M3 codes of activation `x`, shared likewise."""
    if (x, amax) not in rewriter.shared:
        base = f"{x}.q{sum(tensor == x for tensor, _ in rewriter.shared)}"
        factor = rewriter.scalar(f"{base}.multiplier", float(multiplier(torch.tensor(amax))))
        wide = rewriter.node("Cast", [x], f"{base}.wide", to=TensorProto.FLOAT)
        scaled = rewriter.node("Mul", [wide, factor], f"{base}.scaled")
        kind = TensorProto.FLOAT8E4M3FN
        rewriter.shared[x, amax] = rewriter.node("QuantizeLinear", [scaled, one], f"{base}.values", output_dtype=kind)
    return rewriter.shared[x, amax]


def _dequantized(rewriter: Rewriter, codes: str, one: str, base: str) -> str:
    """DQ -> fp32, Cast -> bf16: the types TensorRT fuses into its FP8 kernels."""
    dense = rewriter.node("DequantizeLinear", [codes, one], f"{base}.f32")
    return rewriter.node("Cast", [dense], f"{base}.bf16", to=TensorProto.BFLOAT16)
