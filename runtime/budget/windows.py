"""Windows that stay laid out between the passes of a chunk: what a layer's takes, and how many the memory allows."""

from __future__ import annotations

from dataclasses import replace

from longtake.formats.memory import Use
from longtake.formats.recipe import Recipe
from longtake.runtime.budget.use import budget_of
from longtake.training.models.presets import Preset

SPARE_BYTES = 1_000_000_000  # left free: what a budget estimates may be more, and others use the GPU, too
ASKED, FITTING = "as asked", "as the memory that is free allows"


def window_bytes(recipe: Recipe, preset: Preset | None = None) -> int:
    """Bytes of one layer's window. 0 where nothing keeps one: our own FP8 attention does, between engine segments."""
    if recipe.mode != "segmented" or recipe.attention != "fp8" or recipe.compute_capability != "9.0":
        return 0
    from longtake.plugins.sink_attention.hopper import HEAD_DIMS, addresses

    model = preset or recipe.model
    if model.family != "wan" or model.dit.head_dim not in HEAD_DIMS:
        return 0
    slots = model.window_chunks
    dims = {"L": model.chunk_tokens, "H": model.dit.heads, "D": model.dit.head_dim, "S": slots, "W": slots}
    return addresses(dims, 0)[1]


def windows_that_fit(recipe: Recipe, use: Use, free: int, sessions: int = 1, preset: Preset | None = None) -> int:
    """Layers whose window may stay laid out in what is left of `free` bytes once `use` has all it takes, and sessions beside
    it their caches. None under guidance: two caches take turns then, and every pass finds the other one's window."""
    size = window_bytes(recipe, preset)
    if not size or use.guided:
        return 0
    budget = budget_of(recipe, replace(use, kept_windows=0), preset)
    caches = sum(term.bytes for term in budget.terms if "cache" in term.name and term.place == "generate")
    left = free - budget.peak["generate"] - (sessions - 1) * caches - SPARE_BYTES
    return max(0, min((preset or recipe.model).dit.layers, left // size))
