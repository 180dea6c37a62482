"""A small world with random weights, run by PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from untrained import random_models  # noqa: E402
from worlds import SMALL, small_preset  # noqa: E402

from longtake.formats.recipe import Gate, Recipe  # noqa: E402
from longtake.runtime.backends.torch_oracle import TorchBackend  # noqa: E402
from longtake.runtime.generator import Generator  # noqa: E402
from longtake.training.models.load import Models  # noqa: E402
from longtake.training.models.presets import Preset  # noqa: E402
from longtake.training.models.text.words import tokenize  # noqa: E402


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    return small_preset(tmp_path_factory.mktemp("preset"))


@pytest.fixture(scope="session")
def models(preset: Preset) -> Models:
    return random_models(preset, 3)


@pytest.fixture(scope="session")
def recipe(preset: Preset) -> Recipe:
    gate = Gate(dit=0.03, vae=0.03, text_encoder=0.03, context=0.03, ssim=0.98)
    return Recipe("small_bf16", SMALL, "bf16", "bf16", "9.0", "segmented", gate, own_preset=preset)


@pytest.fixture
def generator(recipe: Recipe, models: Models) -> Generator:
    return Generator(TorchBackend(recipe, models), tokenize)
