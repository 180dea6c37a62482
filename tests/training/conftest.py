"""A preset and a VAE checkpoint small enough that a training step takes milliseconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.presets import TINY, DiTConfig, Preset, TextEncoderConfig
from longtake.training.models.side_file import SideFile
from longtake.training.models.wan.vae import CausalVAE

SMALL = replace(
    TINY,
    name="small",
    dit=DiTConfig(dim=64, ffn_dim=128, layers=2, heads=2, channels=16, text_dim=32, text_len=32),
    vae=replace(TINY.vae, encoder_dim=8, decoder_dim=8, dim_mult=(1, 1, 1, 1)),
    text=TextEncoderConfig(kind="words", dim=32, layers=1, heads=2, length=32),
)


@pytest.fixture(scope="session")
def small_preset() -> Preset:
    return SMALL


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that holds an untrained VAE of the small preset."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    side = SideFile("vae", SMALL.name)
    save_checkpoint(folder / "vae.safetensors", CausalVAE(SMALL.vae).state_dict(), side)
    return folder
