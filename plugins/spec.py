"""What an op looks like, written once: torch op, ONNX schema, plugin and kernel launcher all read it.

Legend: S slots, L tokens of a block, H heads, D head_dim, W window length, N out features, K in features, T tokens; of a
video stream T frames of a step, F frames of history, Y, X sizes of a frame, C channels, N channels that come out; of the
DiT's blocks C features, F latent frames of a chunk, E text length.
Packed bytes are typed INT8 everywhere: the runtimes that must carry them have no common 4-bit or FP8 type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DOMAIN = "longtake"
PLUGIN_NAMESPACE = "longtake"
PLUGIN_VERSION = "1"
PLUGIN_ATTRIBUTES = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}  # of an ONNX node

CACHE_FORMATS = ("nvfp4", "bf16")
QK_NORM_EPS = 1e-6
BLOCK_NORM_EPS = 1e-6
STREAM_OPS = ("norm_silu_extend", "stream_extend")
CHANNEL_NORM_EPS = 1e-24  # on the mean square: only keeps zeros zero


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of an op. `dtype` is "compute" (the activation dtype), "int8", "int32", "fp32" or "fp8" (E4M3).

    `shape` names dimensions by letter or gives a formula in them, such as "D/2", "H*D", "T+F" or "T-2".
    """

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class OpSpec:
    """An op of the `longtake` domain.

    name: torch op name (`longtake::<name>`), also the ONNX op type and the plugin name.
    aliases: output index -> input index that it is written over, in place.
    may_share: output index -> input index that may lie in the output's last bytes: whoever writes an element there has
        read the input's element of that place, and nobody else reads it.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[tuple[int, int], ...] = ()
    may_share: tuple[tuple[int, int], ...] = ()


def cache_tensors(fmt: str) -> tuple[TensorSpec, ...]:
    """The tensors that hold one layer's K/V slots in cache format `fmt` ("nvfp4" or "bf16")."""
    if fmt == "bf16":
        return (TensorSpec("cache", "compute", ("S", "2", "L", "H", "D")),)
    return (
        TensorSpec("values", "int8", ("S", "2", "L", "H", "D/2")),
        TensorSpec("scales", "int8", ("S", "2", "L", "H", "D/16")),
        TensorSpec("amax", "fp32", ("S", "2")),
    )


def _block(name: str) -> TensorSpec:
    return TensorSpec(name, "compute", ("L", "H", "D"))


def kv_cache_write(fmt: str) -> OpSpec:
    """Quantize one block's K and V into slot `write_slot` ([1] int32; -1 writes nothing), in place."""
    cache = cache_tensors(fmt)
    return OpSpec(
        f"kv_cache_write_{fmt}",
        inputs=(_block("k"), _block("v"), *cache, TensorSpec("write_slot", "int32", ("1",))),
        outputs=cache,
        aliases=tuple((i, 2 + i) for i in range(len(cache))),
    )


def sink_attention(fmt: str) -> OpSpec:
    """Attention of one block's queries over the slots in `table` ([W] int32, 1 <= W; -1 is the fresh k, v)."""
    return OpSpec(
        f"sink_attention_{fmt}",
        inputs=(_block("q"), _block("k"), _block("v"), *cache_tensors(fmt), TensorSpec("table", "int32", ("W",))),
        outputs=(_block("out"),),
    )


def qk_norm_rope() -> OpSpec:
    """RMSNorm over each token's whole vector (all heads; eps is `QK_NORM_EPS`), then RoPE, of queries and keys."""
    weights = tuple(TensorSpec(f"{x}_weight", "compute", ("H*D",)) for x in "qk")
    tables = tuple(TensorSpec(f"rope_{f}", "fp32", ("L", "D/2")) for f in ("cos", "sin"))
    return OpSpec(
        "qk_norm_rope",
        inputs=(_block("q"), _block("k"), *weights, *tables),
        outputs=(_block("q_out"), _block("k_out")),
    )


def stream_extend(norm: bool) -> OpSpec:
    """Put a causal convolution's history before x, and the end of that over the history, in place. `norm`: x goes
    through an RMS norm over its channels (eps is `CHANNEL_NORM_EPS`) and SiLU first."""
    x, cache, y = (TensorSpec(n, "compute", (t, "Y", "X", "C")) for n, t in (("x", "T"), ("cache", "F"), ("y", "T+F")))
    gamma = (TensorSpec("gamma", "compute", ("C",)),) if norm else ()
    name = "norm_silu_extend" if norm else "stream_extend"
    aliases = ((1, 1 + len(gamma)),)
    return OpSpec(name, inputs=(x, *gamma, cache), outputs=(y, cache), aliases=aliases, may_share=((0, 0),))


def nvfp4_dequantize() -> OpSpec:
    """E2M1 value x E4M3 block scale, exact in bf16; the per-tensor scale is applied to the product's output."""
    return OpSpec(
        "nvfp4_dequantize",
        inputs=(TensorSpec("values", "int8", ("N", "K/2")), TensorSpec("scales", "int8", ("N", "K/16"))),
        outputs=(TensorSpec("weight", "compute", ("N", "K")),),
    )


@dataclass(frozen=True)
class BlockNorm:
    """Which row of a block's modulation (0 to 5) a norm of the DiT takes for what. gate: of the y that is added to x
    before; None: y is added as it is. scale, shift: None for an affine norm (weight, bias). following: scale and shift
    are those of the next block. residual: whether there is a y."""

    gate: int | None = None
    scale: int | None = None
    shift: int | None = None
    residual: bool = True
    following: bool = False


BLOCK_NORMS: dict[str, BlockNorm] = {
    "norm_modulate": BlockNorm(scale=1, shift=0, residual=False),  # before the first block's self-attention
    "gated_norm_affine": BlockNorm(gate=2),  # self-attention's end, cross-attention's norm
    "residual_norm_modulate": BlockNorm(scale=4, shift=3),  # cross-attention's end, the FFN's norm
    "gated_norm_modulate": BlockNorm(gate=5, scale=1, shift=0, following=True),  # the FFN's end, the next block's norm
}


def block_norm(name: str, fp8: bool = False) -> OpSpec:
    """x' = x + gate * y and n = LN(x') * (1 + scale) + shift in fp32 (eps is `BLOCK_NORM_EPS`), modulated by the sum of a
    block's table and that of the frame's time, e. fp8: y is a product without its scale and bias, and n comes out as
    codes of n * factor."""
    form = BLOCK_NORMS[name]
    rows, one = ("L", "C"), ("1", "6", "C")
    given = [TensorSpec("x", "compute", rows)]
    given += [TensorSpec("y", "compute", rows)] if form.residual else []
    given += [TensorSpec("y_scale", "fp32", ("C",)), _features("y_bias")] if form.residual and fp8 else []
    given += [TensorSpec("e", "compute", ("F", "6", "C")), TensorSpec("modulation", "compute", one)]
    given += [TensorSpec("next_modulation", "compute", one)] if form.following else []
    given += [_features("weight"), _features("bias")] if form.scale is None else []
    given += [FACTOR] if fp8 else []
    made = [TensorSpec("x_out", "compute", rows)] if form.residual else []
    made += [TensorSpec("n", "fp8" if fp8 else "compute", rows)]
    return OpSpec(f"{name}_fp8" if fp8 else name, tuple(given), tuple(made))


FACTOR = TensorSpec("factor", "fp32", ("1",))  # 448 / amax: what brings a tensor into E4M3's range


def _features(name: str) -> TensorSpec:
    return TensorSpec(name, "compute", ("C",))


def rms_norm() -> OpSpec:
    """RMSNorm over a token's whole vector (eps is `QK_NORM_EPS`), of cross-attention's queries."""
    x = TensorSpec("x", "compute", ("L", "C"))
    return OpSpec("rms_norm", inputs=(x, _features("weight")), outputs=(TensorSpec("n", "compute", ("L", "C")),))


def quantize_fp8(gelu: bool = False) -> OpSpec:
    """E4M3 codes of x * factor; `gelu`: of GELU(x * scale + bias), where x is a product without its scale and bias."""
    ends = (TensorSpec("scale", "fp32", ("C",)), _features("bias")) if gelu else ()
    inputs = (TensorSpec("x", "compute", ("L", "C")), *ends, FACTOR)
    codes = TensorSpec("codes", "fp8", ("L", "C"))
    return OpSpec("gelu_quantize_fp8" if gelu else "quantize_fp8", inputs, (codes,))


def cross_attention() -> OpSpec:
    """Attention of one block's queries over a prompt's keys and values, all of them."""
    context = TensorSpec("context", "compute", ("2", "E", "H", "D"))
    return OpSpec("cross_attention", inputs=(_block("q"), context), outputs=(_block("out"),))


def linear_bf16(gelu: bool = False) -> OpSpec:
    """x W^T + b, then GELU (tanh) if asked for, in fp32, rounded once."""
    return OpSpec(
        "linear_gelu_bf16" if gelu else "linear_bf16",
        inputs=(
            TensorSpec("x", "compute", ("T", "K")),
            TensorSpec("weight", "compute", ("N", "K")),
            TensorSpec("bias", "compute", ("N",)),
        ),
        outputs=(TensorSpec("out", "compute", ("T", "N")),),
    )


def linear_fp8(whole: bool = False) -> OpSpec:
    """x W^T of codes as they stand, rounded to bf16: scales and bias are of the op that follows. `whole`: with a scale
    a row of W, which is the activation's as well, and the bias, both in fp32 before the one rounding."""
    ends = (TensorSpec("scale", "fp32", ("N",)), TensorSpec("bias", "compute", ("N",))) if whole else ()
    return OpSpec(
        "linear_rows_fp8" if whole else "linear_fp8",
        inputs=(TensorSpec("x", "fp8", ("T", "K")), TensorSpec("weight", "fp8", ("N", "K")), *ends),
        outputs=(TensorSpec("out", "compute", ("T", "N")),),
    )


CONV_KERNELS = {
    "conv_3x3x3": (3, 3, 3), "conv_3x3x3_add": (3, 3, 3), "conv_3x1x1": (3, 1, 1), "conv_1x3x3": (1, 3, 3),
    "conv_1x1x1": (1, 1, 1),
}  # fmt: skip
UP_OPS = {"upsample_space": 1, "upsample_time": 2}  # frames that come out for each
DUPLICATE_OPS = {"duplicate_up": 1, "duplicate_up_time": 2}


def conv(name: str) -> OpSpec:
    """A convolution with bias of a stream's frames, channels last: the frame is padded, time is not (the history is in
    x). `_add`: a residual is added before the one rounding. The weight is as in PyTorch; a library may be handed it with
    its channels last (see plugins/conv)."""
    kernel = CONV_KERNELS[name]
    frames = f"T-{kernel[0] - 1}" if kernel[0] > 1 else "T"
    out = (frames, "Y", "X", "N")
    inputs = (
        TensorSpec("x", "compute", ("T", "Y", "X", "C")),
        TensorSpec("weight", "compute", ("N", "C", *map(str, kernel))),
        TensorSpec("bias", "compute", ("N",)),
        *((TensorSpec("residual", "compute", out),) if name.endswith("_add") else ()),
    )
    return OpSpec(name, inputs, outputs=(TensorSpec("out", "compute", out),))


def upsample(name: str) -> OpSpec:
    """Repeat each position twice in both directions. "upsample_time": the two halves of the channels are two frames."""
    time = UP_OPS[name]
    wide = ("T", "Y", "X", "C")
    out = ("T", "2*Y", "2*X", "C") if time == 1 else ("2*T", "2*Y", "2*X", "C/2")
    return OpSpec(name, (TensorSpec("x", "compute", wide),), (TensorSpec("out", "compute", out),))


def duplicate_up(name: str) -> OpSpec:
    """y + x, whose channels are repeated and unfolded into 2x2 positions and, "_time", two frames: a shortcut."""
    out = TensorSpec("out", "compute", ("T" if DUPLICATE_OPS[name] == 1 else "2*T", "2*Y", "2*X", "N"))
    x = TensorSpec("x", "compute", ("T", "Y", "X", "C"))
    return OpSpec(name, (x, TensorSpec("y", out.dtype, out.shape)), (out,), may_share=((0, 1),))


def made_shape(spec: OpSpec, shapes: Sequence[Sequence[Any]]) -> tuple[Any, ...] | None:
    """The first output's shape where it is like none of the inputs, from theirs (0: not known); else None."""
    if spec.name == "nvfp4_dequantize":
        return shapes[0][0], shapes[0][1] * 2
    if spec.name in STREAM_OPS:
        known = all(not isinstance(shape[0], str) and shape[0] for shape in (shapes[0], shapes[-1]))
        return (shapes[0][0] + shapes[-1][0] if known else 0, *shapes[0][1:])
    if spec.name in DUPLICATE_OPS:
        return tuple(shapes[1])
    if spec.name in UP_OPS or spec.name in CONV_KERNELS:
        return _frames_shape(spec.name, *shapes[:2])
    return (shapes[0][0], shapes[1][0]) if spec.name in LINEAR_OPS else None


def _frames_shape(name: str, x: Sequence[Any], weight: Sequence[Any] = ()) -> tuple[Any, ...]:
    """[T,Y,X,C] of what a convolution or upsampling makes; sizes that are not known are 0."""
    if len(x) != 4 or any(isinstance(size, str) or not size for size in x):
        return (0,) * 4
    if name in CONV_KERNELS:
        return (x[0] - CONV_KERNELS[name][0] + 1, x[1], x[2], weight[0])
    time = UP_OPS[name]
    return (time * x[0], 2 * x[1], 2 * x[2], x[3] // time)


def made_dtype(spec: OpSpec, output: int, likes: Sequence[str]) -> str:
    """The dtype of an output that is written over no input, from those of the inputs: activations come out as they
    went in, or as bf16 where none did."""
    kind = spec.outputs[output].dtype
    if kind != "compute":
        return kind
    return next((like for like, tensor in zip(likes, spec.inputs) if tensor.dtype == "compute"), "bf16")


LINEAR_OPS: dict[str, OpSpec] = {
    spec.name: spec for spec in (linear_bf16(), linear_bf16(gelu=True), linear_fp8(), linear_fp8(whole=True))
}
LIBRARY_OPS: dict[str, OpSpec] = {**LINEAR_OPS, "cross_attention": cross_attention()}

BLOCK_OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        *(block_norm(name, fp8) for name in BLOCK_NORMS for fp8 in (False, True)),
        rms_norm(),
        quantize_fp8(),
        quantize_fp8(gelu=True),
    )
}
"""What lies between the linears of the DiT's blocks."""

KERNEL_OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        *(kv_cache_write(fmt) for fmt in CACHE_FORMATS),
        *(sink_attention(fmt) for fmt in CACHE_FORMATS),
        qk_norm_rope(),
        stream_extend(norm=True),
        stream_extend(norm=False),
        *map(upsample, UP_OPS),
        *map(duplicate_up, DUPLICATE_OPS),
        nvfp4_dequantize(),
        *BLOCK_OPS.values(),
    )
}
"""Ops with a kernel of ours, which are plugins as well; the others run through a library, between engines only."""

CONV_OPS: dict[str, OpSpec] = {name: conv(name) for name in CONV_KERNELS}

OPS: dict[str, OpSpec] = KERNEL_OPS | LIBRARY_OPS | CONV_OPS
