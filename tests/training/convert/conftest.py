"""A preset of the 5B's kind that a test converts in milliseconds, and its models with weights that are all different."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from longtake.training.dit import CausalDiT
from longtake.training.presets import WAN22_TI2V_5B, DiTConfig, Preset, TextEncoderConfig

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
