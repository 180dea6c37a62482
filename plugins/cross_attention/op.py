"""Attention of one block's queries over a prompt's keys and values, all of them; through a library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longtake.machine.capability import attention_methods
from longtake.plugins.cache_format import block
from longtake.plugins.cross_attention.reference import cross_attention
from longtake.plugins.kernels import Dims
from longtake.plugins.spec import Library, Op, OpSpec, TensorSpec

ANY_SIZE = "torch, unfused"  # whatever torch has, where the sizes suit nothing faster


def _launchers() -> Mapping[str, Callable[..., Any]]:
    from longtake.plugins.cross_attention import library

    return {**library.LAUNCHERS, ANY_SIZE: library.unfused}


def _methods(compute_capability: str, dims: Dims, attention: str) -> Sequence[str]:
    return [*(method for method, _ in attention_methods(compute_capability, "bf16", dims["D"])), ANY_SIZE]


OPS = (
    Op(
        OpSpec(
            "cross_attention",
            inputs=(block("q"), TensorSpec("context", "compute", ("2", "E", "H", "D"))),
            outputs=(block("out"),),
        ),
        cross_attention,
        ways=tuple(Library(method, _launchers) for method in ("cudnn", "torch", ANY_SIZE)),
        sizes=({"L": 128, "E": 32, "H": 4, "D": 64}, {"L": 33, "E": 17, "H": 3, "D": 48}),
        methods=_methods,
    ),
)
