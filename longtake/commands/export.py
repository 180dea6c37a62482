"""`longtake export`: checkpoints to ONNX, one folder a preset and precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from longtake.accuracy.compare import compare_networks
from longtake.accuracy.rows import require_gate, table, worst_of_kinds
from longtake.errors import LongtakeError
from longtake.export.package import PlainGraphs, export_package, inputs_digest, steps_of
from longtake.export.weights import weights_from_folder
from longtake.formats.exported import Export
from longtake.formats.recipe import DEFAULT_PRESET, Recipe, recipe_named, recipe_names
from longtake.options import Command, option
from longtake.paths import EXPORTS, REPOSITORY
from longtake.training.models.checkpoint import weights_digests
from longtake.training.models.load import load_models, read_side
from longtake.training.models.presets import Preset
from longtake.training.models.text.sentencepiece import carry_tokenizer

Graphs = dict[tuple[Preset, tuple[str, ...]], PlainGraphs]


@dataclass(frozen=True)
class ExportOptions:
    """What"""

    recipe: tuple[str, ...] = option((), repeated=True, metavar="NAME")
    """a shipped recipe or a .yaml file; may be repeated (default: all of preset tiny)"""
    checkpoints: Path | None = option(None, metavar="FOLDER")
    """what is exported (default: the preset's shipped checkpoints)"""
    out: Path = option(EXPORTS, metavar="FOLDER")
    """where the folders of networks are made"""
    skeleton: bool = option(False)
    """graphs only, no checkpoints needed: for building segmented engines and measuring with random weights"""
    parity: bool = option(True)
    """leave out the comparison with PyTorch"""
    force: bool = option(False)
    """export even if nothing has changed"""


def run(options: ExportOptions) -> int:
    """Export each distinct (preset, precision, cache) once."""
    graphs: Graphs = {}
    for recipe in distinct(options.recipe or recipe_names(DEFAULT_PRESET)):
        folder = options.out / recipe.onnx_name
        parity = options.parity and not options.skeleton
        how = {"force": options.force, "parity": parity, "skeleton": options.skeleton}
        print_sizes(folder, export(recipe, options.checkpoints, folder, graphs=graphs, **how))
    return 0


def distinct(names: Sequence[str]) -> list[Recipe]:
    """The recipes, without those that share another's ONNX files."""
    recipes: dict[str, Recipe] = {}
    for recipe in map(recipe_named, names):
        kept = recipes.setdefault(recipe.onnx_name, recipe)
        kept.require_same(recipe, recipe.onnx_name)
        if kept.cache != recipe.cache:
            raise LongtakeError(
                f"recipes {kept.name} and {recipe.name} would share {recipe.onnx_name} with different caches",
                got=f"{kept.cache}, {recipe.cache}",
                expected="the same cache",
                fix="give one of them another preset or precision",
            )
    return list(recipes.values())


def export(
    recipe: Recipe,
    checkpoints: Path | None,
    folder: Path,
    *,
    force: bool,
    parity: bool,
    graphs: Graphs | None = None,
    skeleton: bool = False,
) -> Export:
    """Export one recipe unless `folder` is up to date; returns what lies there.

    Args:
        graphs: by preset and vocabulary, lets several exports share what is the same for all recipes.
        skeleton: graphs only; `checkpoints` are not looked at.
    """
    source = checkpoints if checkpoints is not None else REPOSITORY / recipe.model.checkpoints
    if recipe.model.text.kind != "words" and not skeleton:
        carry_tokenizer(source, folder)
    inputs = inputs_digest(recipe, None if skeleton else source)
    package = None if force else up_to_date(folder, inputs)
    if package is not None and package.recipe != recipe.whole:
        package = replace(package, recipe=recipe.whole)
        package.write(folder)
    if package is not None and (package.parity or not parity):
        print(f"{recipe.onnx_name}: up to date (checkpoints and code unchanged; --force exports again)")
        return package
    if package is None:
        weights = None if skeleton else weights_from_folder(recipe.model, source)
        graphs, key = {} if graphs is None else graphs, (recipe.model, weights.vocabulary if weights else ())
        if key not in graphs:
            graphs[key] = PlainGraphs(recipe.model, key[1] or None)
        with tqdm(total=steps_of(recipe.model), desc=recipe.onnx_name, unit="step", leave=False) as bar:

            def advance(words: str) -> None:
                bar.set_postfix_str(words)
                bar.update()

            package = export_package(graphs[key], recipe, folder, inputs, advance, weights)
        if not skeleton:  # where what is not exported is found at run time
            sampling = read_side(source / "dit.safetensors", "dit", recipe.model).sampling
            held = weights_digests(source)
            package = replace(package, checkpoints=str(source.resolve()), sampling=sampling, weights=held)
            package.write(folder)
    return check_parity(recipe, source, folder, package) if parity else package


def check_parity(recipe: Recipe, checkpoints: Path, folder: Path, export: Export) -> Export:
    """The export with its parity table, printed and written; raises GateError if a row fails (then nothing is kept).

    Networks too large for ONNX Runtime's one message have no view and are left out, which is said.
    """
    whole = [name for name, network in export.networks.items() if f"{name}.ort.onnx" in network.files]
    if left := [name for name in export.networks if name not in whole]:
        print(
            f"{recipe.onnx_name}: no parity table for {', '.join(left)}: too large for ONNX Runtime on a CPU; "
            "a preset of the same widths and fewer layers has one"
        )
    if not whole:
        return export
    bar = tqdm(
        compare_networks(load_models(recipe.model, checkpoints), recipe, folder, networks=whole),
        desc=f"{recipe.onnx_name}: parity",
        unit="row",
        leave=False,
    )
    rows = list(bar)
    print("\n".join(["parity, PyTorch <-> ONNX Runtime:", *table(rows)]))
    require_gate(rows, recipe.onnx_name)
    export = replace(export, parity=tuple(row.as_json() for row in worst_of_kinds(rows)))
    export.write(folder)
    return export


def up_to_date(folder: Path, inputs: str) -> Export | None:
    """A whole package made from the same inputs, else None."""
    try:
        export = Export.read(folder)
    except LongtakeError:
        return None
    return export if export.inputs == inputs else None


def print_sizes(folder: Path, export: Export) -> None:
    """Sizes of what lies in `folder`."""
    print(f"{folder}:")
    for name, network in export.networks.items():
        sizes = {name: file.bytes / 1e6 for name, file in network.files.items()}
        view = sizes.pop(f"{name}.ort.onnx", None)
        viewed = "no view" if view is None else f"{view:8.2f} MB view"
        linears = f", {len(network.linears)} quantized linears" if network.linears else ""
        print(f"  {name:18} {sum(sizes.values()):8.2f} MB ONNX, {viewed}{linears}")


COMMAND = Command(
    run, (ExportOptions,), "Export every network of a recipe to ONNX, check the files, and compare them with PyTorch."
)
