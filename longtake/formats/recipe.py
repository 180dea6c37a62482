"""Recipes: how a preset's linears, cache and attention are stored and computed for one target, and the gate."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from longtake.checked_yaml import read_yaml
from longtake.errors import LongtakeError, nearest
from longtake.paths import REPOSITORY
from longtake.plugins.cache_format import CACHE_FORMATS
from longtake.record import record_from_mapping
from longtake.training.models.families import preset_named
from longtake.training.models.presets import PRESETS, Preset, WorldPreset

RECIPES = REPOSITORY / "engines" / "recipes"
DEFAULT_PRESET = "tiny"  # its checkpoints are shipped: what commands take all recipes of when none is named
PRECISIONS = ("nvfp4", "w4a16", "fp8", "bf16")  # from the fewest bits a weight to the most
ATTENTIONS = ("bf16", "fp8")
LINEARS = ("engine", "library")
MODES = ("fused", "segmented")
VAE_OPS = ("engine", "library")
VAE_CONVS = ("bf16", "fp8", "int8", "calibrated")


@dataclass(frozen=True)
class Gate:
    """Accuracy gate against the PyTorch model of the same recipe: relative L2 errors, and SSIM of frames."""

    dit: float
    vae: float
    text_encoder: float
    context: float
    ssim: float

    def __post_init__(self) -> None:
        for key, limit in vars(self).items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit <= 1:
                raise LongtakeError(
                    f"bad gate {key}", got=repr(limit), expected="a number from 0 to 1", fix="see engines/recipes"
                )


@dataclass(frozen=True)
class Recipe:
    """A recipe file, named after it; those in engines/recipes are called model_precision_target.

    preset: its name. own_preset: the preset itself, None where it is the shipped one of that name.
    precision: "nvfp4" (native W4A4), "w4a16" (4-bit weights, bf16 arithmetic), "fp8" (native W8A8) or "bf16".
    cache: "nvfp4" or "bf16". compute_capability: such as "12.0". mode: "fused" or "segmented".
    attention: what the sink attention's two products are computed in, "bf16" or "fp8".
    linears: what multiplies in the DiT's blocks: the engine, or between engine segments a library ("library": cuBLASLt).
    memory_gb: memory of the smallest card it is meant for, in GB of 10^9 bytes as sold; 0 for any card.
    vae_ops: what runs the steady VAE decoder, "engine" (TensorRT) or, in a segmented recipe, "library": cuDNN the
        convolutions, our kernels what lies between them and the caches, and the engine has attention and the head left.
    vae_conv: what a library's VAE decoder computes its convolutions in: "bf16", or all but the first, the last and the 1x1x1
        ones in 8-bit codes, "fp8", "int8" or for each whichever calibration found the finer, "calibrated".
    """

    name: str
    preset: str
    precision: str
    cache: str
    compute_capability: str
    mode: str
    gate: Gate
    attention: str = "bf16"
    linears: str = "engine"
    memory_gb: int = 0
    vae_ops: str = "engine"
    vae_conv: str = "bf16"
    own_preset: WorldPreset | Preset | None = None

    def __post_init__(self) -> None:
        presets = tuple(PRESETS) if self.own_preset is None else (self.own_preset.name,)
        for key, allowed in (
            ("precision", PRECISIONS), ("cache", CACHE_FORMATS), ("mode", MODES), ("preset", presets),
            ("attention", ATTENTIONS), ("linears", LINEARS), ("vae_ops", VAE_OPS),
            ("vae_conv", VAE_CONVS),
        ):  # fmt: skip
            if getattr(self, key) not in allowed:
                what, fix = f"recipe {self.name}: bad {key}", f"set {key}: {allowed[0]}"
                raise LongtakeError(what, got=repr(getattr(self, key)), expected=" | ".join(allowed), fix=fix)
        if not re.fullmatch(r"[0-9]+\.[0-9]", self.compute_capability):
            what, fix = f"recipe {self.name}: bad compute_capability", "compute_capability: '12.0'"
            raise LongtakeError(what, got=repr(self.compute_capability), expected="such as '12.0'", fix=fix)
        if self.linears == "library" and (self.mode != "segmented" or self.precision not in ("fp8", "bf16", "w4a16")):
            what, got = f"recipe {self.name}: a library cannot run these linears", f"{self.precision}, {self.mode}"
            raise LongtakeError(what, got=got, expected="fp8, bf16 or w4a16, segmented", fix="set linears: engine")
        if self.vae_ops == "library" and self.mode != "segmented":
            what = f"recipe {self.name}: a library cannot run this VAE decoder"
            raise LongtakeError(what, got=self.mode, expected="segmented", fix="set vae_ops: engine")
        if self.vae_conv != "bf16" and self.vae_ops != "library":
            what, got = f"recipe {self.name}: an engine cannot run 8-bit convolutions", f"vae_conv: {self.vae_conv}"
            raise LongtakeError(what, got=got, expected="vae_ops: library beside it", fix="set vae_conv: bf16")
        if self.memory_gb < 0:
            what, expected = f"recipe {self.name}: bad memory_gb", "a whole number of at least 0"
            raise LongtakeError(what, got=repr(self.memory_gb), expected=expected, fix="set memory_gb: 0")

    @property
    def model(self) -> Preset:
        return self.own_preset or preset_named(self.preset)

    @property
    def whole(self) -> Recipe:
        """The same with its preset in it, shipped or not: what is recorded, to be read where the preset's file is not."""
        return replace(self, own_preset=self.model)

    @property
    def read(self) -> Recipe:
        """The same as it is where it was recorded: a preset that is shipped here is no own one."""
        return replace(self, own_preset=None) if self.own_preset == PRESETS.get(self.preset) else self

    def require_same(self, asked: Recipe, where: object) -> None:
        """Raise LongtakeError if what lies at `where`, made by this recipe, is not what recipe `asked` makes.

        Recipes of other names may share files. The gate and the size of a card are asked for, not made.
        """
        told = replace(self, gate=asked.gate, memory_gb=asked.memory_gb)
        for what, got, expected in (("preset", self.model, asked.model), ("recipe", told, asked)):
            if got.name == expected.name and got != expected:
                raise LongtakeError(
                    f"{where} was made by another {what} of the name {got.name}",
                    got=_differences(got, expected),
                    expected=_differences(expected, got),
                    fix="make it again with `longtake export` and `longtake engines`, or give one of them another name",
                )

    @property
    def onnx_name(self) -> str:
        """Export depends on preset, precision, cache and who runs what; targets share the ONNX files."""
        linears = "_library" if self.linears == "library" else ""
        vae = "_vae_library" if self.vae_ops == "library" else ""
        return f"{self.preset}_{self.precision}{linears}{vae}" + (
            f"_conv_{self.vae_conv}" if self.vae_conv != "bf16" else ""
        )


def _differences(one: object, other: object) -> dict[str, object]:
    """The fields of `one` that `other` has otherwise."""
    names = [field.name for field in fields(one) if field.compare]  # type: ignore[arg-type]
    return {name: getattr(one, name) for name in names if getattr(one, name) != getattr(other, name)}


def recipe_from_file(path: Path) -> Recipe:
    """The recipe in a file, named after it. Its preset is a shipped one by name, or a file by its path from this one.

    Raises:
        LongtakeError: a key is unknown, missing, or has a value that cannot be; names file, key and the nearest key.
    """
    given = read_yaml(path, "recipe", "key: value lines in UTF-8", "see engines/recipes")
    own: Preset | None = None
    if isinstance(given, dict):
        preset, capability = given.get("preset"), given.get("compute_capability")
        if isinstance(preset, str) and preset.endswith((".yaml", ".yml")):
            own = preset_named(preset, path.parent)
            given = {**given, "preset": own.name}
        if isinstance(capability, float):
            given = {**given, "compute_capability": str(capability)}
    recipe: Recipe = record_from_mapping(
        Recipe, given, f"recipe {path.name}", "see engines/recipes", name=path.stem, own_preset=own
    )
    return recipe.read


def recipe_names(preset: str = "") -> list[str]:
    """Names of the shipped recipes, or of those of one preset."""
    return sorted(path.stem for path in RECIPES.glob(f"{preset}_*.yaml" if preset else "*.yaml"))


def recipe_named(name: str) -> Recipe:
    """A shipped recipe by name, or any recipe file by path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        expected = "one of " + ", ".join(recipe_names()) + ", or a path to a .yaml file"
        fix = nearest(name, recipe_names(), "pass one of these with --recipe")
        raise LongtakeError("unknown recipe", got=name, expected=expected, fix=fix)
    return recipe_from_file(path)


def recipe_for(compute_capability: str | None, preset: str = DEFAULT_PRESET) -> str:
    """The recipe of `preset` with the fewest bits that is made for this GPU; without one, that of native FP4.

    Plans for a GPU that isn't there can still be built, and their recipe runs through the reference backend.
    """
    recipes = [recipe_named(name) for name in recipe_names(preset)]
    mine = [r for r in recipes if r.compute_capability == compute_capability]
    mine = mine or [r for r in recipes if r.precision == PRECISIONS[0]]
    return min(mine, key=lambda recipe: PRECISIONS.index(recipe.precision)).name
