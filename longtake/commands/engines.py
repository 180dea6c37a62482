"""`longtake engines`: ONNX to TensorRT plans for one or more recipes, with a closing table."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from longtake.chain import HowToExport, add_ranks, build, export
from longtake.commands.export import default_model
from longtake.engines.build import PlanResult, require_buildable
from longtake.errors import UnavailableError
from longtake.formats.exported import Export
from longtake.formats.model_name import Model, asked_for, claimed, folder_of, only_name_with
from longtake.formats.recipe import DEFAULT_PRESET, Recipe, recipe_for, recipe_named, recipe_names
from longtake.machine.flavour import Flavour, flavour_for, gpu_compute_capability
from longtake.options import Bounds, Command, check, option
from longtake.provenance import resident_bytes
from longtake.runtime.parallel.open import require_cut, require_split


@dataclass(frozen=True)
class EngineOptions:
    """What"""

    model: str | None = option(None, metavar="NAME[@RECIPE]")
    """a model by name, or its folder of checkpoints (default: the one exported for the recipe, else the shipped one)"""
    recipe: tuple[str, ...] = option((), repeated=True, metavar="NAME")
    """a shipped recipe or a .yaml file; may be repeated (default: that of --model, else all of preset tiny that this
    machine can build)"""
    onnx: Path | None = option(None, metavar="FOLDER")
    """where the folders of exported networks are (default: LONGTAKE_HOME/models/NAME/RECIPE/onnx)"""
    out: Path | None = option(None, metavar="FOLDER")
    """where the folders of engines are made (default: LONGTAKE_HOME/models/NAME/RECIPE/engines)"""
    skeleton: bool = option(False)
    """build from graphs without weights, exported without checkpoints if need be (segmented recipes)"""
    force: bool = option(False)
    """build from an export that failed its comparison with PyTorch"""
    gpus: Annotated[int, Bounds(1)] = option(1, metavar="P")
    """also the plans of one of P GPUs that share a video (segmented recipes; docs/multi-gpu.md)"""

    def __post_init__(self) -> None:
        check(self)


def run(options: EngineOptions) -> int:
    """Build each recipe and print what was built."""
    machine = gpu_compute_capability()
    asked = asked_for(options.model) if options.model is not None else None
    names: Sequence[str] = options.recipe
    if asked is not None and not names:
        preset = asked.model.preset if asked.model else DEFAULT_PRESET
        names = [asked.recipe.name if asked.recipe else recipe_for(machine, preset)]
    recipes = [recipe_named(name) for name in names] if names else _buildable(machine)
    for recipe in recipes:  # what cannot be built is said before the first one starts
        if options.gpus > 1:
            require_split(recipe.model, options.gpus)
            require_cut(recipe, options.gpus)
        require_buildable(recipe, flavour_of(recipe, machine), machine)
    for recipe in recipes:
        flavour = flavour_of(recipe, machine)
        print(f"{recipe.name}: {flavour.label} for compute capability {recipe.compute_capability}, {recipe.mode}")
        print(f"  {flavour.reason}")
        onnx, out = prepared(options, recipe, asked.model if asked else None)
        if options.gpus > 1:
            add_ranks(recipe, onnx, options.gpus, print)
        results = build(recipe, onnx, out, flavour, machine, options.force, print)
        print(format_results(results))
        print(f"  peak host memory {resident_bytes() / 1e9:.1f} GB")
    return 0


def prepared(options: EngineOptions, recipe: Recipe, model: Model | None) -> tuple[Path, Path]:
    """(the export, the folder of engines) of a recipe; exported first if it isn't."""
    found = exported_model(recipe, model, options)
    home = folder_of(found.name, recipe)
    onnx = home / "onnx" if options.onnx is None else options.onnx / recipe.onnx_name
    out = home / "engines" if options.out is None else options.out / recipe.name
    if not Export.is_in(onnx):
        print(f"  {onnx} is not exported yet; exporting {found.name} first")
        how = HowToExport(parity=not options.skeleton, skeleton=options.skeleton, model=found.name, say=print)
        with claimed(found) if options.onnx is None and not options.skeleton else nullcontext():
            export(recipe, None if options.skeleton else found.checkpoints, onnx, how)
    return onnx, out


def exported_model(recipe: Recipe, model: Model | None, options: EngineOptions) -> Model:
    """The model that was asked for; else the one that was exported for the recipe; else the shipped one.

    Raises:
        LongtakeError: several were exported for it.
    """
    if model is not None or options.skeleton or options.onnx is not None:
        return model or default_model(recipe, options.skeleton)
    name = only_name_with(recipe.name, "pass --model")
    known = asked_for(name).model if name else None
    return known or default_model(recipe)


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
