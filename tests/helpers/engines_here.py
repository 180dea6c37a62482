"""Engines of the shipped student for the GPU that is here: exported and built once, under LONGTAKE_HOME, then found there."""

from __future__ import annotations

from pathlib import Path

from longtake.preparation import model_and_recipe, prepared

STUDENT = "tiny-4step"


def engines_of(recipe: str) -> Path:
    """The folder of engines of a recipe for this machine's compute capability; processes wait for the one that makes it."""
    model, chosen = model_and_recipe(STUDENT, recipe)
    assert chosen is not None
    folder = prepared(model, chosen)
    assert folder.name == "engines", f"{recipe} has no engines on this machine"
    return folder
