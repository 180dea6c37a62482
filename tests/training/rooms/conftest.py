"""A small world that is trained on walks through rooms: its VAE, and a teacher that sees whole walks. Trained once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_rooms import train  # noqa: E402

from longtake.training.models.families import preset_from_file  # noqa: E402
from longtake.training.models.presets import Preset  # noqa: E402

YAML = """
base: world-tiny
dit: {dim: 32, ffn_dim: 48, layers: 4, heads: 2, channels: 8, text_dim: 16, text_len: 32}
vae:
  z_channels: 8
  encoder_widths: [8, 8, 16]
  decoder_widths: [8, 16, 32]
text: {dim: 16, layers: 1, heads: 2, length: 32}
sampling: {steps: 2, timesteps: [1000, 727]}
height: 32
width: 48
"""


@pytest.fixture(scope="session")
def preset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "small.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture(scope="session")
def preset(preset_file: Path) -> Preset:
    return preset_from_file(preset_file)


@pytest.fixture(scope="session")
def vae(preset_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vae")
    assert train(preset_file, out, "--stage", "vae", "--steps", "1", "--batch", "1") == 0
    return out


@pytest.fixture(scope="session")
def teacher(preset_file: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    words = "--stage dit --context whole --loss-weighting uniform --steps 2 --batch 2 --stories 2 --chunks 2".split()
    assert train(preset_file, out, *words, "--vae", str(vae)) == 0
    return out
