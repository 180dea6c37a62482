"""Every op by name. An op's folder is named here and nowhere else; whatever else knows the ops asks this file.

Importing it imports the references (torch): no CUDA bindings, no TensorRT, no library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

from longtake.errors import LongtakeError, some
from longtake.plugins.block_norm import op as block_norm
from longtake.plugins.conv import op as conv
from longtake.plugins.conv8 import op as conv8
from longtake.plugins.cross_attention import op as cross_attention
from longtake.plugins.frame_attention import op as frame_attention
from longtake.plugins.gated_ffn import op as gated_ffn
from longtake.plugins.gdn_scan import op as gdn_scan
from longtake.plugins.kernels import Kernel
from longtake.plugins.kv_cache_write import op as kv_cache_write
from longtake.plugins.linear import op as linear
from longtake.plugins.nvfp4_dequantize import op as nvfp4_dequantize
from longtake.plugins.qk_norm_rope import op as qk_norm_rope
from longtake.plugins.quantize_fp8 import op as quantize_fp8
from longtake.plugins.ray_transform import op as ray_transform
from longtake.plugins.short_conv import op as short_conv
from longtake.plugins.sink_attention import op as sink_attention
from longtake.plugins.slot_write import op as slot_write
from longtake.plugins.spec import Op
from longtake.plugins.stream_extend import op as stream_extend
from longtake.plugins.upsample import op as upsample

FOLDERS = (
    kv_cache_write,
    sink_attention,
    qk_norm_rope,
    stream_extend,
    upsample,
    nvfp4_dequantize,
    block_norm,
    quantize_fp8,
    linear,
    cross_attention,
    conv,
    conv8,
    gdn_scan,
    ray_transform,
    short_conv,
    gated_ffn,
    frame_attention,
    slot_write,
)


@cache
def all_ops() -> dict[str, Op]:
    """Every op, by name. Raises LongtakeError if two have the same."""
    ops: dict[str, Op] = {}
    for folder in FOLDERS:
        for op in folder.OPS:
            if op.spec.name in ops:
                raise LongtakeError("two ops have one name", got=op.spec.name, fix=f"rename that of {folder.__name__}")
            ops[op.spec.name] = op
    return ops


@cache
def kernel_ops() -> dict[str, Op]:
    """Those with a kernel of ours, which are plugins as well."""
    return {name: op for name, op in all_ops().items() if op.kernel}


def kernel_of(name: str) -> Kernel:
    """The kernel of an op. Raises LongtakeError for an unknown op, or one that only libraries run."""
    kernel = op_named(name).kernel
    if kernel is None:
        raise LongtakeError(f"{name} has no kernel of ours, and is no plugin", expected=", ".join(kernel_ops()))
    return kernel


def op_named(name: str) -> Op:
    """An op. Raises LongtakeError for an unknown name."""
    if name not in all_ops():
        again = "if another version made what holds it: longtake export --force, then longtake engines"
        raise LongtakeError("unknown op", got=name, expected=some(all_ops(), 3), fix=again)
    return all_ops()[name]


def coded_op(name: str, codes: str) -> str:
    """The name of the op that does in 8-bit codes what op `name` does without."""
    return f"{op_named(name).in_codes or name}_{codes}"


def conv_ops(names: Iterable[str]) -> dict[str, int]:
    """How many of these ops are convolutions that run in what: 8-bit codes, or "bf16"."""
    ops = [op for op in map(op_named, names) if op.kernel_size]
    return dict(sorted(Counter(op.codes or "bf16" for op in ops).items()))
