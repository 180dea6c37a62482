"""A two-layer model of 64 x 64 pixels with random weights, exported once a precision for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from held_weights import weights_from_models
from shared_graphs import SharedGraphs
from untrained import random_models

from longtake.export.package import PlainGraphs, export_package
from longtake.formats.recipe import Recipe, recipe_named
from longtake.training.models.load import Models
from longtake.training.models.presets import TINY

RECIPES = {"bf16": "tiny_bf16_sm89", "w4a16": "tiny_w4a16_sm89", "nvfp4": "tiny_nvfp4_sm120", "fp8": "tiny_fp8_sm90"}
Package = tuple[Models, Recipe, Path]


@pytest.fixture(scope="session")
def small_models() -> Models:
    preset = replace(TINY, dit=replace(TINY.dit, layers=2), height=64, width=64)
    return random_models(preset, seed=1)


@pytest.fixture(scope="session")
def small_graphs(small_models: Models, tmp_path_factory: pytest.TempPathFactory) -> PlainGraphs:
    return SharedGraphs(small_models.preset, tmp_path_factory)


@pytest.fixture(scope="session")
def package(
    small_models: Models, small_graphs: PlainGraphs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Package]:
    """package("w4a16") is (plain models, recipe, folder that `longtake export` would have written)."""
    made: dict[str, Package] = {}

    def make(precision: str) -> Package:
        if precision not in made:
            recipe = recipe_named(RECIPES[precision])
            folder = tmp_path_factory.mktemp(precision)
            weights = weights_from_models(small_models)
            export_package(small_graphs, recipe, folder, "inputs", lambda words: None, weights)
            made[precision] = small_models, recipe, folder
        return made[precision]

    return make
