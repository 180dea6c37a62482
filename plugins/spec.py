"""What an op looks like, written once: torch op, ONNX schema, plugin and kernel launcher all read it.

Legend: S slots, L tokens of a block, H heads, D head_dim, W window length, N out features, K in features, T tokens; of a
video stream T frames of a step, F frames of history, Y, X sizes of a frame, C channels.
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
STREAM_OPS = ("norm_silu_extend", "stream_extend")
CHANNEL_NORM_EPS = 1e-24  # on the mean square: only keeps zeros zero


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of an op. `dtype` is "compute" (the activation dtype), "int8", "int32", "fp32" or "fp8" (E4M3).

    `shape` names dimensions by letter or gives a formula in them, such as "D/2", "H*D" or "T+F".
    """

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class OpSpec:
    """An op of the `longtake` domain.

    name: torch op name (`longtake::<name>`), also the ONNX op type and the plugin name.
    aliases: output index -> input index that it is written over, in place.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[tuple[int, int], ...] = ()


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
    return OpSpec(name, inputs=(x, *gamma, cache), outputs=(y, cache), aliases=((1, 1 + len(gamma)),))


def nvfp4_dequantize() -> OpSpec:
    """E2M1 value x E4M3 block scale, exact in bf16; the per-tensor scale is applied to the product's output."""
    return OpSpec(
        "nvfp4_dequantize",
        inputs=(TensorSpec("values", "int8", ("N", "K/2")), TensorSpec("scales", "int8", ("N", "K/16"))),
        outputs=(TensorSpec("weight", "compute", ("N", "K")),),
    )


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


def linear_fp8() -> OpSpec:
    """x W^T of codes as they stand, rounded to bf16: scales and bias are the graph's, before and behind the product."""
    return OpSpec(
        "linear_fp8",
        inputs=(TensorSpec("x", "fp8", ("T", "K")), TensorSpec("weight", "fp8", ("N", "K"))),
        outputs=(TensorSpec("out", "compute", ("T", "N")),),
    )


def made_shape(spec: OpSpec, shapes: Sequence[Sequence[Any]]) -> tuple[Any, ...] | None:
    """The first output's shape where it is like none of the inputs, from theirs (0: not known); else None."""
    if spec.name == "nvfp4_dequantize":
        return shapes[0][0], shapes[0][1] * 2
    if spec.name in STREAM_OPS:
        known = all(not isinstance(shape[0], str) and shape[0] for shape in (shapes[0], shapes[-1]))
        return (shapes[0][0] + shapes[-1][0] if known else 0, *shapes[0][1:])
    return (shapes[0][0], shapes[1][0]) if spec.name in LIBRARY_OPS else None


LIBRARY_OPS: dict[str, OpSpec] = {spec.name: spec for spec in (linear_bf16(), linear_bf16(gelu=True), linear_fp8())}

KERNEL_OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        *(kv_cache_write(fmt) for fmt in CACHE_FORMATS),
        *(sink_attention(fmt) for fmt in CACHE_FORMATS),
        qk_norm_rope(),
        stream_extend(norm=True),
        stream_extend(norm=False),
        nvfp4_dequantize(),
    )
}
"""Ops with a kernel of ours, which are plugins as well; LIBRARY_OPS run through a library, between engines only."""

OPS: dict[str, OpSpec] = KERNEL_OPS | LIBRARY_OPS
