"""A preset of the 5B's kind that a test converts in milliseconds, and its models with weights that are all different."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from longtake.training.models.presets import WAN22_TI2V_5B, DiTConfig, Preset, TextEncoderConfig
from longtake.training.models.wan.dit import CausalDiT

SMALL = replace(
    WAN22_TI2V_5B,
    name="small",
    dit=DiTConfig(dim=128, ffn_dim=256, layers=2, heads=2, channels=48, text_dim=32, text_len=8),
    vae=replace(WAN22_TI2V_5B.vae, encoder_dim=8, decoder_dim=8, dim_mult=(1, 1, 1, 1)),
    text=TextEncoderConfig(kind="umt5", dim=32, layers=2, heads=2, length=8, ffn_dim=48, vocabulary=64),
    height=32,
    width=64,
)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` with normal weights: nothing is zero or one, so no two tensors can be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return module.eval()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same keys, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.fixture(scope="session")
def preset() -> Preset:
    return SMALL


@pytest.fixture(scope="session")
def dit_state(preset: Preset) -> dict[str, Tensor]:
    """Wan's keys, bf16."""
    return {key: value.bfloat16() for key, value in randomized(CausalDiT(preset.dit)).state_dict().items()}


@pytest.fixture
def stock_vae(preset: Preset) -> dict[str, Tensor]:
    """Random VAE weights of the small preset under the keys of `Wan2.2_VAE.pth`."""
    return stock_vae_state(preset)


def stock_vae_state(preset: Preset, device: str = "cpu") -> dict[str, Tensor]:
    """Keys and shapes as Wan's vae2_2.py makes them, written out independently of the code that reads them."""
    config, state = preset.vae, {}
    torch.manual_seed(0)

    def put(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, device=device) * 0.1

    def conv(name: str, out: int, into: int, *kernel: int) -> None:
        put(f"{name}.weight", out, into, *kernel)
        put(f"{name}.bias", out)

    def residual(name: str, into: int, out: int) -> None:
        put(f"{name}.residual.0.gamma", into, 1, 1, 1)
        conv(f"{name}.residual.2", out, into, 3, 3, 3)
        put(f"{name}.residual.3.gamma", out, 1, 1, 1)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.shortcut", out, into, 1, 1, 1)

    def middle(name: str, dim: int) -> None:
        residual(f"{name}.0", dim, dim)
        put(f"{name}.1.norm.gamma", dim, 1, 1)
        conv(f"{name}.1.to_qkv", 3 * dim, dim, 1, 1)
        conv(f"{name}.1.proj", dim, dim, 1, 1)
        residual(f"{name}.2", dim, dim)

    z, times = config.z_channels, config.temporal_down
    dims = [config.encoder_dim * m for m in (1, *config.dim_mult)]
    conv("encoder.conv1", dims[0], 12, 3, 3, 3)
    for i, (into, out) in enumerate(zip(dims[:-1], dims[1:])):
        level = f"encoder.downsamples.{i}.downsamples"
        for j in range(config.res_blocks):
            residual(f"{level}.{j}", into if j == 0 else out, out)
        if i < len(times):
            conv(f"{level}.{config.res_blocks}.resample.1", out, out, 3, 3)
            if times[i]:
                conv(f"{level}.{config.res_blocks}.time_conv", out, out, 3, 1, 1)
    middle("encoder.middle", dims[-1])
    put("encoder.head.0.gamma", dims[-1], 1, 1, 1)
    conv("encoder.head.2", 2 * z, dims[-1], 3, 3, 3)
    conv("conv1", 2 * z, 2 * z, 1, 1, 1)
    conv("conv2", z, z, 1, 1, 1)
    dims = [config.decoder_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    conv("decoder.conv1", dims[0], z, 3, 3, 3)
    middle("decoder.middle", dims[0])
    for i, (into, out) in enumerate(zip(dims[:-1], dims[1:])):
        level = f"decoder.upsamples.{i}.upsamples"
        for j in range(config.res_blocks + 1):
            residual(f"{level}.{j}", into if j == 0 else out, out)
        if i < len(times):
            conv(f"{level}.{config.res_blocks + 1}.resample.1", out, out, 3, 3)
            if times[::-1][i]:
                conv(f"{level}.{config.res_blocks + 1}.time_conv", 2 * out, out, 3, 1, 1)
    put("decoder.head.0.gamma", dims[-1], 1, 1, 1)
    conv("decoder.head.2", 12, dims[-1], 3, 3, 3)
    return state
