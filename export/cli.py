"""`longtake export`: checkpoints to ONNX, one folder a preset and precision."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longtake.engines.recipe import DEFAULT_PRESET, Recipe, recipe_named, recipe_names
from longtake.engines.spec import NETWORKS
from longtake.export.package import (
    INDEX,
    PlainGraphs,
    export_package,
    inputs_digest,
    load_index,
    steps_of,
)
from longtake.export.parity import Row, parity_table, require_parity
from longtake.runtime.errors import LongtakeError
from longtake.runtime.files import write_json
from longtake.runtime.places import EXPORTS, REPOSITORY
from longtake.training.networks import Models, load_models


def register(subparsers: Any) -> None:
    """Add the `export` command."""
    parser = subparsers.add_parser(
        "export",
        help="PyTorch to ONNX, with a structural check and a parity table",
        description="Export every network of a recipe to ONNX, check the files, and compare them with PyTorch.",
    )
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME",
        help="a shipped recipe or a .yaml file; may be repeated (default: all of preset tiny)",
    )
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: the preset's shipped checkpoints")
    parser.add_argument("--out", type=Path, default=EXPORTS, metavar="FOLDER", help="default: export/build")
    parser.add_argument("--no-parity", action="store_true", help="leave out the comparison with PyTorch")
    parser.add_argument("--force", action="store_true", help="export even if nothing has changed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export each distinct (preset, precision, cache) once."""
    graphs: dict[str, PlainGraphs] = {}
    for recipe in distinct(args.recipe or recipe_names(DEFAULT_PRESET)):
        folder = args.out / recipe.onnx_name
        index = export(recipe, args.checkpoints, folder, force=args.force, parity=not args.no_parity, graphs=graphs)
        print_index(folder, index)
    return 0


def distinct(names: list[str]) -> list[Recipe]:
    """The recipes, without those that share another's ONNX files."""
    recipes: dict[str, Recipe] = {}
    for recipe in map(recipe_named, names):
        kept = recipes.setdefault(recipe.onnx_name, recipe)
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
    graphs: dict[str, PlainGraphs] | None = None,
) -> dict[str, Any]:
    """Export one recipe unless `folder` is up to date; returns export.json's content.

    `graphs`, by preset, lets several exports from the same checkpoints share what is the same for all recipes.
    """
    source = checkpoints if checkpoints is not None else REPOSITORY / recipe.model.checkpoints
    inputs = inputs_digest(recipe, source)
    index = None if force else up_to_date(folder, inputs)
    if index is not None and (index["parity"] or not parity):
        print(f"{recipe.onnx_name}: up to date (checkpoints and code unchanged; --force exports again)")
        return index
    graphs = {} if graphs is None else graphs
    if recipe.preset not in graphs:
        graphs[recipe.preset] = PlainGraphs(load_models(recipe.model, source))
    if index is None:
        with tqdm(total=steps_of(), desc=recipe.onnx_name, unit="step", leave=False) as bar:
            index = export_package(graphs[recipe.preset], recipe, folder, inputs, lambda words: _advance(bar, words))
    if parity:
        check_parity(graphs[recipe.preset].models, recipe, folder, index)
    return index


def check_parity(models: Models, recipe: Recipe, folder: Path, index: dict[str, Any]) -> None:
    """Fill the parity table of export.json, print it, and raise GateError if a row fails (then nothing is kept)."""
    bar = tqdm(parity_table(models, recipe, folder), desc=f"{recipe.onnx_name}: parity", unit="row", leave=False)
    rows = list(bar)
    print(format_rows(rows))
    require_parity(rows, recipe.onnx_name)
    index["parity"] = [row.as_json() for row in rows]
    write_json(folder / INDEX, index)


def _advance(bar: tqdm, words: str) -> None:
    bar.set_postfix_str(words)
    bar.update()


def up_to_date(folder: Path, inputs: str) -> dict[str, Any] | None:
    """The index of a whole package made from the same inputs, else None."""
    try:
        index = load_index(folder)
    except LongtakeError:
        return None
    return index if index.get("inputs") == inputs else None


def print_index(folder: Path, index: dict[str, Any]) -> None:
    """Sizes of what lies in `folder`."""
    print(f"{folder}:")
    for name in NETWORKS:
        entry = index["networks"][name]
        sizes = {file: item["bytes"] / 1e6 for file, item in entry["files"].items()}
        graph, data, view = sizes.values()
        linears = f", {len(entry['linears'])} linears in 4 bits" if entry["linears"] else ""
        print(f"  {name:13} {graph + data:8.2f} MB ONNX, {view:8.2f} MB view{linears}")


def format_rows(rows: list[Row]) -> str:
    """The parity table as text."""
    lines = [f"  {'network':13} {'case':20} {'output':14} {'rel. L2':>9} {'max abs':>9} {'gate':>6}"]
    for row in rows:
        verdict = "ok" if row.passed else "FAIL"
        lines.append(
            f"  {row.network:13} {row.case:20} {row.output:14} {row.error:9.2e} {row.max_abs:9.2e} {row.gate:6g} {verdict}"
        )
    return "\n".join(["parity, PyTorch <-> ONNX Runtime:", *lines])
