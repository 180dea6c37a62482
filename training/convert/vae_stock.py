"""Weight names of `Wan2.2_VAE.pth` (Wan's vae2_2.py) to those of diffusers, which `vae_keys` brings to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from longtake.errors import LongtakeError

Value = TypeVar("Value")

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_LEVEL = {"downsamples": ("down_blocks", "downsampler"), "upsamples": ("up_blocks", "upsampler")}


def is_stock(state: Mapping[str, object]) -> bool:
    """Whether the keys are Wan's own."""
    return "encoder.conv1.weight" in state or "decoder.conv1.weight" in state


def from_stock(state: Mapping[str, Value]) -> dict[str, Value]:
    """`state` under diffusers' names (shapes stay); keys that aren't the VAE's come through as they are."""
    return {diffusers_name(key): value for key, value in state.items()}


def diffusers_name(key: str) -> str:
    """Diffusers' name of Wan's `key`."""
    if key.startswith(("conv1.", "conv2.")):
        return ("quant_conv." if key[4] == "1" else "post_quant_conv.") + key[6:]
    part, _, rest = key.partition(".")
    for ours, theirs in _ENDS.items():
        if rest.startswith(f"{ours}."):
            return f"{part}.{theirs}.{rest[len(ours) + 1 :]}"
    if found := re.match(r"middle\.([012])\.", rest):
        return f"{part}.mid_block.{_MIDDLE[found[1]]}.{_residual(rest[found.end() :])}"
    if found := re.match(r"(downsamples|upsamples)\.(\d+)\.\1\.(\d+)\.", rest):
        level, sampler = _LEVEL[found[1]]
        layer = rest[found.end() :]
        inner = f"resnets.{found[3]}" if layer.startswith(("residual.", "shortcut.")) else sampler
        return f"{part}.{level}.{found[2]}.{inner}.{_residual(layer)}"
    return key


def _residual(layer: str) -> str:
    for theirs, name in _RESIDUAL.items():
        if layer.startswith(f"{theirs}."):
            return name + layer[len(theirs) :]
    return layer


def refuse_wan21(shape: tuple[int, ...] | None) -> None:
    """Raise LongtakeError if `shape`, of the encoder's first convolution, is that of the Wan 2.1 VAE."""
    if shape is not None and len(shape) == 5 and shape[1] == 3:
        raise LongtakeError("this is the Wan 2.1 VAE", got=f"a first convolution {list(shape)}: 3 colours, no pixel patches",
                            expected="the Wan 2.2 VAE: 12 input channels, 48 latent channels", fix="pass Wan2.2_VAE.pth")  # fmt: skip
