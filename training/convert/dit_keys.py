"""Names of the DiT's weights: diffusers' `WanTransformer3DModel` to Wan's own, which are ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_ATTENTION = {"attn1": "self_attn", "attn2": "cross_attn"}
_BLOCK = (
    (re.compile(r"(attn[12])\.to_out\.0\."), lambda m: f"{_ATTENTION[m[1]]}.o."),
    (re.compile(r"(attn[12])\.to_([qkv])\."), lambda m: f"{_ATTENTION[m[1]]}.{m[2]}."),
    (re.compile(r"(attn[12])\."), lambda m: f"{_ATTENTION[m[1]]}."),
    (re.compile(r"ffn\.net\.0\.proj\."), lambda m: "ffn.0."),
    (re.compile(r"ffn\.net\.2\."), lambda m: "ffn.2."),
    (re.compile(r"norm2\."), lambda m: "norm3."),  # Wan counts its one affine norm as the third
    (re.compile(r"scale_shift_table$"), lambda m: "modulation"),
)
_OUTSIDE = {
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "proj_out.": "head.head.",
    "scale_shift_table": "head.modulation",
}


def is_diffusers(state: Mapping[str, object]) -> bool:
    """Whether the keys are diffusers'."""
    return any(key.startswith("condition_embedder.") or ".attn1." in key for key in state)


def from_diffusers(state: Mapping[str, Value]) -> dict[str, Value]:
    """`state` under Wan's names; keys that aren't a Wan transformer's come through as they are."""
    return {wan_name(key): value for key, value in state.items()}


def wan_name(key: str) -> str:
    """Wan's name of diffusers' `key`."""
    if block := re.match(r"blocks\.\d+\.", key):
        rest = key[block.end() :]
        for pattern, named in _BLOCK:
            if match := pattern.match(rest):
                return block[0] + named(match) + rest[match.end() :]
        return key
    for prefix, name in _OUTSIDE.items():
        if key.startswith(prefix):
            return name + key[len(prefix) :]
    return key
