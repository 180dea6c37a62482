"""Windows that stay laid out between the passes of a chunk: what a layer's takes."""

from __future__ import annotations

from longtake.formats.recipe import Recipe
from longtake.training.models.presets import Preset


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
