"""`longtake engines`: ONNX to TensorRT plans for one or more recipes, with a closing table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longtake.engines.build import PlanResult, build_recipe, require_buildable
from longtake.errors import UnavailableError
from longtake.formats.bundle import Bundle
from longtake.formats.recipe import DEFAULT_PRESET, Recipe, recipe_named, recipe_names
from longtake.machine.flavour import Flavour, flavour_for, gpu_compute_capability
from longtake.options import Command, option
from longtake.paths import ENGINES, EXPORTS
from longtake.provenance import resident_bytes
from longtake.runtime.budget.terms import terms_of


@dataclass(frozen=True)
class EngineOptions:
    """What"""

    recipe: tuple[str, ...] = option((), repeated=True, metavar="NAME")
    """a shipped recipe or a .yaml file; may be repeated (default: all of preset tiny that this machine can build)"""
    onnx: Path = option(EXPORTS, metavar="FOLDER")
    """where the folders of exported networks are"""
    out: Path = option(ENGINES, metavar="FOLDER")
    """where the folders of engines are made"""
    skeleton: bool = option(False)
    """build from graphs without weights, exported without checkpoints if need be (segmented recipes)"""


def run(options: EngineOptions) -> int:
    """Build each recipe and print what was built."""
    machine = gpu_compute_capability()
    recipes = [recipe_named(name) for name in options.recipe] if options.recipe else _buildable(machine)
    for recipe in recipes:  # what cannot be built is said before the first one starts
        require_buildable(recipe, flavour_of(recipe, machine), machine)
    for recipe in recipes:
        flavour = flavour_of(recipe, machine)
        print(f"{recipe.name}: {flavour.label} for compute capability {recipe.compute_capability}, {recipe.mode}")
        print(f"  {flavour.reason}")
        onnx, out = options.onnx / recipe.onnx_name, options.out / recipe.name
        results = build(recipe, onnx, out, flavour, machine, skeleton=options.skeleton)
        print(format_results(results))
        print(f"  peak host memory {resident_bytes() / 1e9:.1f} GB")
    return 0


def flavour_of(recipe: Recipe, machine: str | None) -> Flavour:
    """The flavour that builds `recipe`: the GPU here matters only if the recipe is for it."""
    return flavour_for(machine if machine == recipe.compute_capability else None)


def _buildable(machine: str | None) -> list[Recipe]:
    recipes = []
    for recipe in map(recipe_named, recipe_names(DEFAULT_PRESET)):
        try:
            require_buildable(recipe, flavour_of(recipe, machine), machine)
        except UnavailableError as error:
            print(f"{recipe.name}: left out, {error.what} ({error.expected})")
        else:
            recipes.append(recipe)
    if not recipes:
        raise UnavailableError("no shipped recipe can be built here", fix="longtake doctor says what is missing")
    return recipes


def build(
    recipe: Recipe, onnx: Path, out: Path, flavour: Flavour, machine: str | None, *, skeleton: bool = False
) -> list[PlanResult]:
    """Export if need be (skeleton: without weights will do), build, and describe the folder in bundle.json.

    Raises:
        IntegrityError: an exported file is not what was exported; no plan is built from it.
    """
    from longtake.formats.exported import Export

    if not Export.is_in(onnx):
        from longtake.commands.export import export

        print(f"  {onnx} is not exported yet; exporting first")
        export(recipe, None, onnx, force=False, parity=False, skeleton=skeleton)
    Export.read(onnx).require_recipe(recipe, onnx, weights=recipe.mode == "fused")
    results = build_recipe(recipe, onnx, out, flavour, machine, sys.stderr.isatty())
    bundle = Bundle.of(out, recipe, flavour, onnx, [result.path for result in results])
    replace(bundle, memory=terms_of(recipe, out)).write()
    return results


def format_results(results: Sequence[PlanResult]) -> str:
    """The closing table."""
    rows = [f"  {'plan':24} {'MB':>8} {'seconds':>8} {'layers':>7}  plugins"]
    for result in results:
        plan = result.manifest
        seconds = "kept" if result.skipped else f"{plan.seconds:.1f}"
        plugins = ", ".join(plan.plugins) or "-"
        rows.append(f"  {plan.plan:24} {plan.size / 1e6:8.2f} {seconds:>8} {plan.layers:7}  {plugins}")
    total = sum(result.manifest.size for result in results)
    return "\n".join([*rows, f"  {'all':24} {total / 1e6:8.2f}  in {results[0].path.parent}"])


COMMAND = Command(
    run,
    (EngineOptions,),
    "Build the TensorRT plans of recipes; what has no ONNX yet is exported first. "
    "Plans that are up to date are left alone.",
)
