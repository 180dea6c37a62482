"""The formats of the K/V cache. Legend: S slots, L tokens of a block, H heads, D head_dim."""

from __future__ import annotations

from longtake.plugins.spec import OpSpec, TensorSpec

CACHE_FORMATS = ("nvfp4", "bf16")


def cache_tensors(fmt: str) -> tuple[TensorSpec, ...]:
    """The tensors that hold one layer's K/V slots in cache format `fmt` ("nvfp4" or "bf16")."""
    if fmt == "bf16":
        return (TensorSpec("cache", "compute", ("S", "2", "L", "H", "D")),)
    return (
        TensorSpec("values", "int8", ("S", "2", "L", "H", "D/2")),
        TensorSpec("scales", "int8", ("S", "2", "L", "H", "D/16")),
        TensorSpec("amax", "fp32", ("S", "2")),
    )


def cache_format_of(spec: OpSpec) -> str:
    """The format of the cache that an op reads or writes."""
    names = {tensor.name for tensor in spec.inputs}
    return next(fmt for fmt in CACHE_FORMATS if names >= {tensor.name for tensor in cache_tensors(fmt)})


def block(name: str) -> TensorSpec:
    """One block's queries, keys or values."""
    return TensorSpec(name, "compute", ("L", "H", "D"))


SLOTS = 4
SIZES: tuple[dict[str, int], ...] = (
    {"S": SLOTS, "L": 128, "H": 4, "D": 64},  # the tiny preset's
    {"S": SLOTS, "L": 7, "H": 3, "D": 128},
    {"S": SLOTS, "L": 33, "H": 3, "D": 48},
    {"S": SLOTS, "L": 128, "H": 3, "D": 128},
    {"S": SLOTS, "L": 1, "H": 1, "D": 16},
)
"""What the ops on a block, and on the slots that hold such, are tried with."""
