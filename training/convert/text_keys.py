"""Names of umT5's weights: Hugging Face's and Wan's own, to ours (`training/models/text/umt5.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from longtake.errors import IntegrityError, some

Value = TypeVar("Value")

HUGGINGFACE = {
    r"shared\.weight": "embedding.weight",
    r"encoder\.final_layer_norm\.weight": "norm.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight": r"blocks.\1.attn.\2.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight": r"blocks.\1.position.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight": r"blocks.\1.norm1.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight": r"blocks.\1.norm2.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight": r"blocks.\1.ffn.gate.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight": r"blocks.\1.ffn.up.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight": r"blocks.\1.ffn.down.weight",
}
WAN = {
    r"token_embedding\.weight": "embedding.weight",
    r"norm\.weight": "norm.weight",
    r"blocks\.(\d+)\.attn\.([qkvo])\.weight": r"blocks.\1.attn.\2.weight",
    r"blocks\.(\d+)\.pos_embedding\.embedding\.weight": r"blocks.\1.position.weight",
    r"blocks\.(\d+)\.norm([12])\.weight": r"blocks.\1.norm\2.weight",
    r"blocks\.(\d+)\.ffn\.gate\.0\.weight": r"blocks.\1.ffn.gate.weight",
    r"blocks\.(\d+)\.ffn\.fc1\.weight": r"blocks.\1.ffn.up.weight",
    r"blocks\.(\d+)\.ffn\.fc2\.weight": r"blocks.\1.ffn.down.weight",
}
TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight; a file may hold either or both
NOT_ENCODER = ("decoder.", "lm_head.")  # in google/umt5-xxl itself


def from_huggingface(state: Mapping[str, Value]) -> dict[str, Value]:
    """Weights of a transformers UMT5EncoderModel, or of a whole UMT5 whose decoder is left out, under our names.

    Raises:
        IntegrityError: a key is unknown; lists them.
    """
    encoder = {key: value for key, value in state.items() if not key.startswith(NOT_ENCODER)}
    if TIED in encoder:
        tied = encoder.pop(TIED)
        encoder.setdefault("shared.weight", tied)
    return _renamed(encoder, HUGGINGFACE, "a Hugging Face umT5")


def from_wan(state: Mapping[str, Value]) -> dict[str, Value]:
    """Weights of Wan's models_t5_umt5-xxl-enc-bf16 under our names.

    Raises:
        IntegrityError: a key is unknown; lists them.
    """
    return _renamed(state, WAN, "Wan's umT5")


def _renamed(state: Mapping[str, Value], rules: Mapping[str, str], kind: str) -> dict[str, Value]:
    patterns = [(re.compile(pattern), name) for pattern, name in rules.items()]
    names: dict[str, str | None] = {}
    for key in state:
        found = ((match, name) for pattern, name in patterns if (match := pattern.fullmatch(key)))
        names[key] = next((match.expand(name) for match, name in found), None)
    unknown = sorted(key for key, name in names.items() if name is None)
    if unknown:
        what, fix = f"the weights aren't those of {kind} encoder", "pass the umT5 encoder's file"
        expected = ", ".join(rules.values()).replace(r"\1", "N").replace(r"\2", "X")
        raise IntegrityError(what, got=some(unknown, 6), expected=expected, fix=fix)
    return {str(names[key]): value for key, value in state.items()}
