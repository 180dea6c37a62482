"""Checks before anything is written: is it this preset's model at all, and are all keys and shapes as they must be?"""

from __future__ import annotations

import re
from collections.abc import Mapping

from longtake.errors import IntegrityError, LongtakeError, some
from longtake.training.convert.pending import Pending
from longtake.training.models.presets import DiTConfig, Preset

Shapes = Mapping[str, tuple[int, ...]]
# (dim, layers, input channels) of the published transformers.
MODELS = {
    (1536, 30, 16): "Wan2.1-T2V-1.3B",
    (1536, 30, 36): "Wan2.1-Fun-1.3B-InP",
    (1536, 30, 48): "Wan2.1-Fun-1.3B-Control",
    (3072, 30, 48): "Wan2.2-TI2V-5B",
    (5120, 40, 16): "Wan2.1-T2V-14B or Wan2.2-T2V-A14B",
    (5120, 40, 36): "Wan2.1-I2V-14B or Wan2.2-I2V-A14B",
}


def refuse_other_model(tensors: Mapping[str, Pending], preset: Preset) -> None:
    """Raise LongtakeError, naming the model, if the DiT's dim, depth or input channels aren't the preset's."""
    embedding = tensors.get("patch_embedding.weight")
    if embedding is None or len(embedding.shape) != 5:
        return
    layers = 1 + max((int(found[1]) for key in tensors if (found := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    got = (embedding.shape[0], layers, embedding.shape[1])
    wanted = (preset.dit.dim, preset.dit.layers, preset.dit.channels)
    # A checkpoint that merely lacks blocks is of this model; its missing keys are listed instead.
    if got == wanted or (got[::2] == wanted[::2] and got not in MODELS and layers < preset.dit.layers):
        return
    name = MODELS.get(got, "another model")
    what, expected = f"this is {name}: dim {got[0]}, {got[1]} layers", f"preset {preset.name}: {_words(preset.dit)}"
    fix = "pass the checkpoint of that model, or another --preset"
    raise LongtakeError(what, got=f"{got[2]} input channels", expected=expected, fix=fix)


def _words(config: DiTConfig) -> str:
    return f"dim {config.dim}, {config.layers} layers, {config.channels} input channels"


def check_fit(tensors: Mapping[str, Pending], expected: Shapes, what: str) -> None:
    """Raise IntegrityError, listing up to ten names of each kind, unless keys and shapes are exactly `expected`."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "extra": sorted(shapes.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(expected[name])}"
            for name in sorted(expected.keys() & shapes.keys()) if tuple(shapes[name]) != tuple(expected[name])
        ],
        "of another type": sorted(
            f"{name} {tensor.dtype}" for name, tensor in tensors.items()
            if name in expected and not tensor.dtype.is_floating_point
        ),
    }  # fmt: skip
    found = [f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if found:
        fix = "pass the checkpoint of this preset's model, whole"
        if not expected.keys() & shapes.keys():
            fix = "the file holds none of them, so another network: see which of --dit, --vae and --text it is for"
        raise IntegrityError(
            f"{what} doesn't fit", got="; ".join(found), expected=f"exactly {len(expected)} tensors", fix=fix
        )
