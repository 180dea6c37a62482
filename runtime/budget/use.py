"""The budget of a use: added up from what the engines' bundle records; worked out anew for what is not built."""

from __future__ import annotations

from pathlib import Path

from longtake.errors import LongtakeError
from longtake.files import read_json, sha256
from longtake.formats.memory import KEPT_WINDOWS, MEASURED, Budget, RecordedTerm, Use, added_up
from longtake.formats.recipe import Recipe
from longtake.training.models.presets import Preset

PLAIN_USE = Use()


def budget_of(recipe: Recipe, use: Use = PLAIN_USE, preset: Preset | None = None) -> Budget:
    """The budget of `recipe`; `preset` overrides the recipe's (tests use smaller ones)."""
    terms = use.recorded if use.ranks == 1 else ()
    if not terms:
        from longtake.runtime.budget.terms import terms_of

        terms = terms_of(recipe, use.engines, preset, use.ranks)
    if use.kept_windows:
        from longtake.runtime.budget.windows import window_bytes

        terms = (*terms, RecordedTerm(KEPT_WINDOWS, use.kept_windows * window_bytes(recipe, preset), "exact"))
    return added_up(recipe.name, terms, use, measured_arena(use.engines) if use.ranks == 1 else {})


def measured_arena(engines: Path | None) -> dict[str, int]:
    """Arena bytes by lane ("denoise", "decode") that a run of these engines wrote down; {} if none did."""
    if engines is None or not (engines / MEASURED).is_file():
        return {}
    try:
        given = read_json(engines / MEASURED)
        if given["bundle"] != sha256(engines / "bundle.json"):
            return {}  # built anew since
        return {str(lane): int(size) for lane, size in given["arena_bytes"].items()}
    except (LongtakeError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return {}  # a figure of convenience: a damaged one is no reason to stop
