"""Weight names of `Wan2.2_VAE.pth` (Wan's vae2_2.py) to those of diffusers, which `vae_keys` brings to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from longtake.errors import LongtakeError

Value = TypeVar("Value")

# Applied in this order.
RULES = {
    r"^conv1\.": "quant_conv.",
    r"^conv2\.": "post_quant_conv.",
    r"^(encoder|decoder)\.conv1\.": r"\1.conv_in.",
    r"^(encoder|decoder)\.head\.0\.": r"\1.norm_out.",
    r"^(encoder|decoder)\.head\.2\.": r"\1.conv_out.",
    r"\.middle\.0\.": ".mid_block.resnets.0.",
    r"\.middle\.1\.": ".mid_block.attentions.0.",
    r"\.middle\.2\.": ".mid_block.resnets.1.",
    r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.(?=residual\.|shortcut\.)": r".\1_blocks.\2.resnets.\3.",
    r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.": r".\1_blocks.\2.\1sampler.",
    r"\.residual\.0\.": ".norm1.",
    r"\.residual\.2\.": ".conv1.",
    r"\.residual\.3\.": ".norm2.",
    r"\.residual\.6\.": ".conv2.",
    r"\.shortcut\.": ".conv_shortcut.",
}


def is_stock(state: Mapping[str, object]) -> bool:
    """Whether the keys are Wan's own."""
    return "encoder.conv1.weight" in state or "decoder.conv1.weight" in state


def from_stock(state: Mapping[str, Value]) -> dict[str, Value]:
    """`state` under diffusers' names (shapes stay); keys that aren't the VAE's come through as they are."""
    return {diffusers_name(key): value for key, value in state.items()}


def diffusers_name(key: str) -> str:
    """Diffusers' name of Wan's `key`."""
    for pattern, name in RULES.items():
        key = re.sub(pattern, name, key)
    return key


def refuse_wan21(shape: tuple[int, ...] | None) -> None:
    """Raise LongtakeError if `shape`, of the encoder's first convolution, is that of the Wan 2.1 VAE."""
    if shape is not None and len(shape) == 5 and shape[1] == 3:
        got = f"a first convolution {list(shape)}: 3 colours, no pixel patches"
        expected = "the Wan 2.2 VAE: 12 input channels, 48 latent channels"
        raise LongtakeError("this is the Wan 2.1 VAE", got=got, expected=expected, fix="pass Wan2.2_VAE.pth")
