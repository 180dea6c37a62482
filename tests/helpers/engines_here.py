"""Engines of the shipped student for the GPU that is here: exported and built once, under LONGTAKE_HOME, then found there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from longtake.preparation import model_and_recipe, prepared

STUDENT = "tiny-4step"
BUILDS = pytest.mark.timeout(1800)  # whatever --timeout says: minutes, where other processes want the cores as well
Test = TypeVar("Test", bound=Callable[..., None])


def on_engines(test: Test) -> Test:
    """Mark a test on a GPU that may be the one for which engines are exported and built."""
    marked: Test = pytest.mark.gpu(BUILDS(test))
    return marked


def engines_of(recipe: str) -> Path:
    """The folder of engines of a recipe for this machine's compute capability; processes wait for the one that makes it."""
    model, chosen = model_and_recipe(STUDENT, recipe)
    assert chosen is not None
    folder = prepared(model, chosen)
    assert folder.name == "engines", f"{recipe} has no engines on this machine"
    return folder
