"""The ops as torch operators `longtake::<name>`, registered when this module is imported.

On every device they are the references; kernels run them elsewhere (engines, segmented backend).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longtake.dtypes import DTYPES, of_torch
from longtake.plugins.registry import all_ops
from longtake.plugins.shapes import infer_dtype, infer_shape
from longtake.plugins.spec import DOMAIN, Op, OpSpec


def torch_schema(spec: OpSpec) -> str:
    """The torch operator schema of an op, for example "(Tensor values, Tensor scales) -> Tensor"."""
    inputs = ", ".join(f"Tensor {t.name}" for t in spec.inputs)
    outputs = ", ".join("Tensor" for _ in spec.outputs)
    return f"({inputs}) -> {outputs if len(spec.outputs) == 1 else f'({outputs})'}"


def torch_op(name: str) -> Any:
    """The operator overload `torch.ops.longtake.<name>.default`."""
    return getattr(getattr(torch.ops, DOMAIN), name).default


def _shapes_only(spec: OpSpec) -> Callable[..., Any]:
    """Outputs without content: like the tensors they are written over, or as the spec says."""
    aliases = dict(spec.aliases)

    def fake(*inputs: Tensor) -> Any:
        shapes, dtypes = [x.shape for x in inputs], [of_torch(x.dtype).name for x in inputs]
        outputs = tuple(
            torch.empty_like(inputs[aliases[i]], memory_format=torch.contiguous_format)
            if i in aliases
            else inputs[0].new_empty(infer_shape(spec, i, shapes), dtype=DTYPES[infer_dtype(spec, i, dtypes)].torch)
            for i in range(len(spec.outputs))
        )
        return outputs if len(outputs) > 1 else outputs[0]

    return fake


def register(op: Op) -> None:
    """Define an op's torch operator; one that exists already is left alone."""
    name = f"{DOMAIN}::{op.spec.name}"
    if hasattr(getattr(torch.ops, DOMAIN), op.spec.name):  # a module reload must not define it twice
        return
    torch.library.define(name, torch_schema(op.spec))
    torch.library.impl(name, ("cpu", "cuda"), op.reference)
    torch.library.register_fake(name, _shapes_only(op.spec))


for _op in all_ops().values():
    register(_op)
