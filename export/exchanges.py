"""The exchanges among ranks in ONNX: a schema each, and the torch exporter's translation. They have no function body."""

from __future__ import annotations

import atexit
import inspect
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset

from longtake.plugins.exchange import DOMAIN, NUMBERS, TENSORS

VERSION = 1
TYPES = ["tensor(bfloat16)", "tensor(float16)", "tensor(float)", "tensor(int8)"]


def register_schemas() -> None:
    """Make the exchanges known to onnx's checker; repeated calls do nothing."""
    for name in TENSORS:
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(_schema(name))
            atexit.register(onnx.defs.deregister_schema, name, VERSION, DOMAIN)  # see functions.register_schemas


def _schema(name: str) -> OpSchema:
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter(tensor, "T") for tensor in TENSORS[name]],
        outputs=[OpSchema.FormalParameter(f"{tensor}_out", "T") for tensor in TENSORS[name]],
        type_constraints=[("T", TYPES, "the activation dtype, or codes")],
        attributes=[OpSchema.Attribute(each, OpSchema.AttrType.INT, required=True) for each in NUMBERS[name]],
    )


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export's `custom_translation_table`."""
    register_schemas()
    return {getattr(torch.ops.longtake_ranks, name).default: _translation(name) for name in TENSORS}


def _translation(name: str) -> Callable[..., Any]:
    op = getattr(Opset(DOMAIN, VERSION), name)

    def translate(*tensors: Any, **numbers: int) -> Any:
        return op(*tensors, **numbers)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(tensor, kind) for tensor in TENSORS[name]]
    named += [inspect.Parameter(number, kind, annotation=int) for number in NUMBERS[name]]
    translate.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]  # the exporter matches by it
    return translate
