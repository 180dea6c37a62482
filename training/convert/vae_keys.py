"""Weight names of the Wan 2.2 VAE: diffusers' `AutoencoderKLWan` (is_residual, patch_size 2) to `training.vae`.

Three things differ besides names: norms hold a plain vector, 1x1 and 3x3 convolutions are 3-D, and a 2x2 pixel patch
lies in the channels as (channel, row, column) where the release has (channel, column, row). Of the encoder's last
convolution only the mean is kept: encoding is deterministic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from longtake.errors import LongtakeError

# The released VAE's per-channel statistics (wan_5b_wrapper.py:61-160): z = (mu - mean) / std.
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

_SUFFIXES = (
    (re.compile(r"\b(conv_in|conv_out|conv1|conv2)\.(weight|bias)$"), r"\1.conv.\2"),
    (re.compile(r"\bconv_shortcut\."), "shortcut."),
    (re.compile(r"\bnorm_out\."), "norm."),
    (re.compile(r"\bto_qkv\."), "qkv."),
    (re.compile(r"\b(?:down|up)sampler\.resample\.1\."), "resample.space."),
    (re.compile(r"\bdownsampler\.time_conv\."), "resample.time."),
    (re.compile(r"\bupsampler\.time_conv\."), "resample.time.conv."),
)
_MIDDLE = {"resnets.0": "before", "attentions.0": "attention", "resnets.1": "after"}


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes for diffusers' VAE weights, all but `latent_mean` and `latent_std`, which aren't in them.

    Nothing is dropped except the log variance's rows of `quant_conv`; dtypes stay. Names that aren't the VAE's come
    through as they are, so that loading lists them as extra.

    Raises:
        LongtakeError: a tensor's shape shows that it is not of a Wan 2.2 VAE.
    """
    levels = len({found[1] for name in state if (found := re.match(r"encoder\.down_blocks\.(\d+)\.", name))})
    return {(ours := our_name(name, levels)): _shaped(ours, tensor) for name, tensor in state.items()}


def our_name(name: str, levels: int) -> str:
    """Our name for diffusers' `name`, of an encoder with `levels` levels before its middle."""
    name = name.replace("post_quant_conv.", "post_quant.").replace("quant_conv.", "quant.")
    if found := re.match(r"(encoder|decoder)\.mid_block\.(\w+\.\d)\.", name):
        stage = levels if found[1] == "encoder" else 0
        name = f"{found[1]}.stages.{stage}.{_MIDDLE.get(found[2], found[2])}.{name[found.end() :]}"
    elif found := re.match(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.", name):
        stage = int(found[2]) + (found[1] == "decoder")
        name = f"{found[1]}.stages.{stage}.{name[found.end() :].replace('resnets.', 'blocks.')}"
    for pattern, replacement in _SUFFIXES:
        name = pattern.sub(replacement, name)
    return name


def _shaped(name: str, tensor: Tensor) -> Tensor:
    """`tensor` as our module `name` holds it."""
    if name.endswith(".gamma"):
        return tensor.reshape(-1)
    if name in ("quant.weight", "quant.bias"):
        return tensor[: tensor.shape[0] // 2].contiguous()
    if name == "encoder.conv_in.conv.weight":
        return _patches(name, tensor, 1)
    if name in ("decoder.conv_out.conv.weight", "decoder.conv_out.conv.bias"):
        return _patches(name, tensor, 0)
    if tensor.ndim == 4 and name.endswith(".weight"):
        return tensor.unsqueeze(2)
    return tensor


def _patches(name: str, tensor: Tensor, dim: int) -> Tensor:
    """Reorder the 12 patch channels along `dim` from (channel, column, row) to (channel, row, column)."""
    if tensor.ndim <= dim or tensor.shape[dim] != 12:
        raise LongtakeError(
            "the VAE is not of the Wan 2.2 kind",
            got=f"{name} with shape {list(tensor.shape)}",
            expected=f"12 patch channels in dimension {dim}: 2x2 pixels of 3 colours",
            fix="pass the VAE of Wan2.2-TI2V-5B; other Wan models have another one",
        )
    return tensor.unflatten(dim, (3, 2, 2)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2).contiguous()
