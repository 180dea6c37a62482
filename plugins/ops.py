"""The ops of plugins/spec.py as torch operators `longtake::<name>`, registered when this module is imported.

On every device they are the references; kernels run them elsewhere (engines, segmented backend).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longtake.dtypes import DTYPES, of_torch
from longtake.plugins.block_norm.reference import BLOCK_NORM_REFERENCES, rms_norm
from longtake.plugins.conv.reference import conv_1x1x1, conv_1x3x3, conv_3x1x1, conv_3x3x3, conv_3x3x3_add
from longtake.plugins.cross_attention.reference import cross_attention
from longtake.plugins.kv_cache_write.reference import kv_cache_write_bf16, kv_cache_write_nvfp4
from longtake.plugins.linear.reference import linear_bf16, linear_fp8, linear_gelu_bf16, linear_rows_fp8
from longtake.plugins.nvfp4_dequantize.reference import nvfp4_dequantize
from longtake.plugins.qk_norm_rope.reference import qk_norm_rope
from longtake.plugins.quantize_fp8.reference import gelu_quantize_fp8, quantize_fp8
from longtake.plugins.sink_attention.reference import sink_attention_bf16, sink_attention_nvfp4
from longtake.plugins.spec import DOMAIN, OPS, OpSpec, made_dtype, made_shape
from longtake.plugins.stream_extend.reference import norm_silu_extend, stream_extend
from longtake.plugins.upsample.reference import duplicate_up, duplicate_up_time, upsample_space, upsample_time

REFERENCES: dict[str, Callable[..., Any]] = {
    "kv_cache_write_nvfp4": kv_cache_write_nvfp4,
    "kv_cache_write_bf16": kv_cache_write_bf16,
    "sink_attention_nvfp4": sink_attention_nvfp4,
    "sink_attention_bf16": sink_attention_bf16,
    "qk_norm_rope": qk_norm_rope,
    "norm_silu_extend": norm_silu_extend,
    "stream_extend": stream_extend,
    "nvfp4_dequantize": nvfp4_dequantize,
    "linear_bf16": linear_bf16,
    "linear_gelu_bf16": linear_gelu_bf16,
    "linear_fp8": linear_fp8,
    "linear_rows_fp8": linear_rows_fp8,
    "cross_attention": cross_attention,
    "rms_norm": rms_norm,
    "quantize_fp8": quantize_fp8,
    "gelu_quantize_fp8": gelu_quantize_fp8,
    **BLOCK_NORM_REFERENCES,
    "conv_3x3x3": conv_3x3x3,
    "conv_3x3x3_add": conv_3x3x3_add,
    "conv_3x1x1": conv_3x1x1,
    "conv_1x3x3": conv_1x3x3,
    "conv_1x1x1": conv_1x1x1,
    "upsample_space": upsample_space,
    "upsample_time": upsample_time,
    "duplicate_up": duplicate_up,
    "duplicate_up_time": duplicate_up_time,
}


def torch_schema(spec: OpSpec) -> str:
    """The torch operator schema of an op, for example "(Tensor values, Tensor scales) -> Tensor"."""
    inputs = ", ".join(f"Tensor {t.name}" for t in spec.inputs)
    outputs = ", ".join("Tensor" for _ in spec.outputs)
    return f"({inputs}) -> {outputs if len(spec.outputs) == 1 else f'({outputs})'}"


def torch_op(name: str) -> Any:
    """The operator overload `torch.ops.longtake.<name>.default`."""
    return getattr(getattr(torch.ops, DOMAIN), name).default


def _shapes_only(spec: OpSpec) -> Callable[..., Any]:
    """Outputs like the tensors they are written over; else output i like input i; what made_shape knows has its own."""

    aliases = dict(spec.aliases)

    def fake(*inputs: Tensor) -> Any:
        made = []
        for i in range(len(spec.outputs)):
            like = inputs[aliases.get(i, i)]
            kind = (
                like.dtype
                if i in aliases
                else DTYPES[made_dtype(spec, i, [of_torch(x.dtype).name for x in inputs])].torch
            )
            shape = made_shape(spec, [x.shape for x in inputs]) if i == 0 else None
            made.append(like.new_empty(like.shape if shape is None else shape, dtype=kind))
        return tuple(made) if len(made) > 1 else made[0]

    return fake


def _register(spec: OpSpec) -> None:
    name = f"{DOMAIN}::{spec.name}"
    torch.library.define(name, torch_schema(spec))
    torch.library.impl(name, ("cpu", "cuda"), REFERENCES[spec.name])
    torch.library.register_fake(name, _shapes_only(spec))


for _spec in OPS.values():
    if not hasattr(getattr(torch.ops, DOMAIN), _spec.name):  # a module reload must not define them twice
        _register(_spec)
