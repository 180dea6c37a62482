"""The exchanges among ranks in ONNX: a schema each, and the torch exporter's translation. They have no function body."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset

from longtake.plugins.exchange import DOMAIN, GATHER_HEADS, GATHER_TOKENS

VERSION = 1
TENSORS = {GATHER_TOKENS: ("q", "k", "v"), GATHER_HEADS: ("out",)}
TYPES = ["tensor(bfloat16)", "tensor(float16)", "tensor(float)"]


def register_schemas() -> None:
    """Make the exchanges known to onnx's checker; repeated calls do nothing."""
    for name, tensors in TENSORS.items():
        if not onnx.defs.has(name, DOMAIN):
            inputs = [OpSchema.FormalParameter(tensor, "T") for tensor in tensors]
            outputs = [OpSchema.FormalParameter(f"{tensor}_out", "T") for tensor in tensors]
            ranks = OpSchema.Attribute("ranks", OpSchema.AttrType.INT, required=True)
            onnx.defs.register_schema(
                OpSchema(
                    name,
                    DOMAIN,
                    VERSION,
                    inputs=inputs,
                    outputs=outputs,
                    type_constraints=[("T", TYPES, "the activation dtype")],
                    attributes=[ranks],
                )
            )
            atexit.register(onnx.defs.deregister_schema, name, VERSION, DOMAIN)  # see functions.register_schemas


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export's `custom_translation_table`."""
    register_schemas()
    opset = Opset(DOMAIN, VERSION)

    def gather_tokens(q: Any, k: Any, v: Any, ranks: int) -> Any:
        return opset.gather_tokens(q, k, v, ranks=ranks)

    def gather_heads(out: Any, ranks: int) -> Any:
        return opset.gather_heads(out, ranks=ranks)

    ops = torch.ops.longtake_ranks
    return {ops.gather_tokens.default: gather_tokens, ops.gather_heads.default: gather_heads}
