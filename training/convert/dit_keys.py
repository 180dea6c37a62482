"""Names of the DiT's weights: diffusers' `WanTransformer3DModel` to Wan's own, which are ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# Applied in this order; Wan's own names match none of them.
RULES = {
    r"^(blocks\.\d+)\.attn1\.": r"\1.self_attn.",
    r"^(blocks\.\d+)\.attn2\.": r"\1.cross_attn.",
    r"_attn\.to_out\.0\.": "_attn.o.",
    r"_attn\.to_([qkv])\.": r"_attn.\1.",
    r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.": r"\1.ffn.0.",
    r"^(blocks\.\d+)\.ffn\.net\.2\.": r"\1.ffn.2.",
    r"^(blocks\.\d+)\.norm2\.": r"\1.norm3.",  # Wan counts its one affine norm as the third
    r"^(blocks\.\d+)\.scale_shift_table$": r"\1.modulation",
    r"^condition_embedder\.(text|time)_embedder\.linear_1\.": r"\1_embedding.0.",
    r"^condition_embedder\.(text|time)_embedder\.linear_2\.": r"\1_embedding.2.",
    r"^condition_embedder\.time_proj\.": "time_projection.1.",
    r"^proj_out\.": "head.head.",
    r"^scale_shift_table": "head.modulation",
}


def is_diffusers(state: Mapping[str, object]) -> bool:
    """Whether the keys are diffusers'."""
    return any(key.startswith("condition_embedder.") or ".attn1." in key for key in state)


def from_diffusers(state: Mapping[str, Value]) -> dict[str, Value]:
    """`state` under Wan's names; keys that aren't a Wan transformer's come through as they are."""
    return {wan_name(key): value for key, value in state.items()}


def wan_name(key: str) -> str:
    """Wan's name of diffusers' `key`."""
    for pattern, name in RULES.items():
        key = re.sub(pattern, name, key)
    return key
