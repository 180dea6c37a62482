"""`longtake export`: checkpoints to ONNX, one folder a model and recipe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from longtake.chain import Graphs, HowToExport, export
from longtake.errors import LongtakeError
from longtake.formats.exported import Export
from longtake.formats.model_name import Model, asked_for, claimed, model_in
from longtake.formats.recipe import DEFAULT_PRESET, Recipe, recipe_for, recipe_named, recipe_names
from longtake.machine.machine import machine_here
from longtake.options import Command, option
from longtake.paths import REPOSITORY


@dataclass(frozen=True)
class ExportOptions:
    """What"""

    model: str | None = option(None, metavar="NAME[@RECIPE]")
    """a model by name, or its folder (default: --checkpoints)"""
    recipe: tuple[str, ...] = option((), repeated=True, metavar="NAME")
    """a shipped recipe or a .yaml file; may be repeated (default: that of --model, else all of preset tiny)"""
    checkpoints: Path | None = option(None, metavar="FOLDER")
    """what is exported (default: the preset's shipped checkpoints)"""
    name: str | None = option(None, metavar="NAME")
    """what the model is called (default: as it was named in training, else as its folder)"""
    replace: bool = option(False)
    """take the name from another checkpoint, and remove what was made of that one"""
    out: Path | None = option(None, metavar="FOLDER")
    """where the folders of networks are made (default: LONGTAKE_HOME/models/NAME/RECIPE/onnx)"""
    skeleton: bool = option(False)
    """graphs only, no checkpoints needed: for building segmented engines and measuring with random weights"""
    parity: bool = option(True)
    """leave out the comparison with PyTorch; the export is marked as unchecked"""
    force: bool = option(False)
    """export even if nothing has changed"""

    def __post_init__(self) -> None:
        if self.model is not None and self.checkpoints is not None:
            what, got = "--model and --checkpoints both name what is exported", f"{self.model} and {self.checkpoints}"
            raise LongtakeError(what, got=got, fix="leave one out")


def run(options: ExportOptions) -> int:
    """Export each recipe of the model."""
    graphs: Graphs = {}
    for recipe, model in exports_of(options):
        onnx_name = recipe.onnx_name
        folder = model.folder(recipe) / "onnx" if options.out is None else options.out / onnx_name
        parity = options.parity and not options.skeleton
        how = HowToExport(options.force, parity, options.skeleton, model.name, print, graphs)
        named = options.out is None and not options.skeleton
        with claimed(model, options.replace) if named else nullcontext():
            exported = export(recipe, None if options.skeleton else model.checkpoints, folder, how)
        print_sizes(folder, exported)
    return 0


def exports_of(options: ExportOptions) -> list[tuple[Recipe, Model]]:
    """(recipe, model) of everything that is asked for."""
    asked = asked_for(options.model) if options.model is not None else None
    model = asked.model if asked else None
    if asked is not None and model is None:
        what, got = "--model names a recipe", options.model
        expected, fix = "a model, or MODEL@RECIPE", f"pass --recipe {options.model}"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    if options.checkpoints is not None and not options.skeleton:
        model = model_in(options.checkpoints, options.name)
    names: Sequence[str] = options.recipe
    if not names and asked is not None and asked.recipe is not None:
        names = [asked.recipe.name]
    if not names and options.model is not None and model is not None:
        names = [recipe_for(machine_here().compute_capability, model.preset)]
    recipes = list(map(recipe_named, names or recipe_names(DEFAULT_PRESET)))
    if options.out is not None:
        recipes = distinct(recipes)
    return [(recipe, model or default_model(recipe, options.skeleton)) for recipe in recipes]


def default_model(recipe: Recipe, skeleton: bool = False) -> Model:
    """The preset's own checkpoints. Raises LongtakeError if they are not there."""
    folder = REPOSITORY / recipe.model.checkpoints
    if skeleton or not (folder / "dit.safetensors").is_file():
        return Model("skeleton" if skeleton else folder.name, folder, recipe.preset)
    return model_in(folder)


def distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, without those that share another's ONNX files."""
    kept: dict[str, Recipe] = {}
    for recipe in recipes:
        one = kept.setdefault(recipe.onnx_name, recipe)
        one.require_same(recipe, recipe.onnx_name)
        if one.cache != recipe.cache:
            what = f"recipes {one.name} and {recipe.name} would share {recipe.onnx_name} with different caches"
            expected, fix = "the same cache", "give one of them another preset or precision"
            raise LongtakeError(what, got=f"{one.cache}, {recipe.cache}", expected=expected, fix=fix)
    return list(kept.values())


def print_sizes(folder: Path, export: Export) -> None:
    """Sizes of what lies in `folder`, and whether it was compared with PyTorch."""
    checked = export.checked
    print(f"{folder}: {checked.state}" + (f" ({checked.why})" if checked.why else ""))
    for name, network in export.networks.items():
        sizes = {name: file.bytes / 1e6 for name, file in network.files.items()}
        view = sizes.pop(f"{name}.ort.onnx", None)
        viewed = "no view" if view is None else f"{view:8.2f} MB view"
        linears = f", {len(network.linears)} quantized linears" if network.linears else ""
        print(f"  {name:18} {sum(sizes.values()):8.2f} MB ONNX, {viewed}{linears}")


COMMAND = Command(
    run, (ExportOptions,), "Export every network of a recipe to ONNX, check the files, and compare them with PyTorch."
)
