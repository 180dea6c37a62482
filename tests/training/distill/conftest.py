"""A teacher small enough that a step of distillation takes milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from untrained import random_models

from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.presets import Preset
from longtake.training.models.side_file import SideFile


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, small_preset: Preset) -> Path:
    """A folder with random networks of the small preset."""
    folder = tmp_path_factory.mktemp("teacher")
    models = random_models(small_preset)
    for name, module in (("dit", models.dit), ("text_encoder", models.text), ("vae", models.vae)):
        side = SideFile(name, small_preset.name, vocabulary=models.vocabulary if name == "text_encoder" else None)
        save_checkpoint(folder / f"{name}.safetensors", module.state_dict(), side)
    return folder
