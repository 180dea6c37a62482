"""Where engines and exported networks lie, and which backend opens them."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from longtake.engines.bundle import load_bundle
from longtake.engines.machine import machine_here
from longtake.engines.recipe import Recipe, recipe_named, recipe_names
from longtake.plugins.capability import Choice, backend_for
from longtake.runtime.backends.base import Backend
from longtake.runtime.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.runtime.files import read_json

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINES = REPOSITORY / "engines" / "build"
EXPORTS = REPOSITORY / "export" / "build"
BUILD_FIX = "run `make export engines`, or pass a folder with --engines"
ORACLE = "torch"  # PyTorch itself, for checks and tests; not among the backends a user is offered
BACKEND_NAMES = ("auto", "fused", "segmented", "reference")


@dataclass(frozen=True)
class Source:
    """Files of one recipe. engines: folder with bundle.json, or None if only exported. vocabulary: text encoder words."""

    recipe: Recipe
    onnx: Path
    engines: Path | None
    vocabulary: tuple[str, ...] | None


def source_from_name(name: Path | str | None) -> Source:
    """Find the files of `name`: a folder of engines, a folder of exported networks, or a recipe.

    Raises:
        LongtakeError: there is no such thing; says what would make it.
    """
    if name is None:
        return _best_source()
    folder = Path(name)
    if (folder / "bundle.json").is_file():
        return _source_from_bundle(folder)
    if (folder / "export.json").is_file():
        return _source_from_export(folder)
    if folder.is_dir():
        raise LongtakeError(f"folder {folder} holds no engines", got="neither bundle.json nor export.json",
                            expected="a folder made by `longtake engines` or `longtake export`", fix=BUILD_FIX)  # fmt: skip
    recipe = recipe_named(str(name))
    found = _source_of_recipe(recipe)
    if found is None:
        raise LongtakeError(f"nothing is built for recipe {recipe.name}",
                            got=f"neither {ENGINES / recipe.name} nor {EXPORTS / recipe.onnx_name}",
                            fix=f"make export engines RECIPE={recipe.name}")  # fmt: skip
    return found


def _source_of_recipe(recipe: Recipe) -> Source | None:
    if (ENGINES / recipe.name / "bundle.json").is_file():
        return _source_from_bundle(ENGINES / recipe.name)
    if (EXPORTS / recipe.onnx_name / "export.json").is_file():
        return _source_from_export(EXPORTS / recipe.onnx_name, recipe)
    return None


def _best_source() -> Source:
    """The first recipe that is built and runs natively here; failing that, the first whose export is there."""
    machine, fallback = machine_here(), None
    for name in recipe_names():
        recipe = recipe_named(name)
        source = _source_of_recipe(recipe)
        if source and source.engines and backend_for(machine, recipe).backend == recipe.mode:
            return source
        # nvfp4 is what the models are trained with
        if source and (fallback is None or recipe.precision == "nvfp4"):
            fallback = source
    if fallback is None:
        raise LongtakeError("no engines and no exported networks are there", got=f"nothing in {ENGINES} or {EXPORTS}",
                            fix=BUILD_FIX)  # fmt: skip
    return fallback


def _source_from_bundle(folder: Path) -> Source:
    bundle = load_bundle(folder)
    return Source(bundle.recipe, bundle.onnx, folder, bundle.vocabulary)


def _source_from_export(folder: Path, recipe: Recipe | None = None) -> Source:
    given = read_json(folder / "export.json")
    if recipe is None:
        wanted = _entry(given, "onnx_name", folder / "export.json")
        matching = [r for r in map(recipe_named, recipe_names()) if r.onnx_name == wanted]
        if not matching:
            raise LongtakeError(f"no recipe fits the export in {folder}", got=wanted,
                                expected=", ".join(recipe_names()))  # fmt: skip
        recipe = matching[0]
    return Source(recipe, folder, None, _vocabulary(given))


def _entry(given: object, key: str, path: Path) -> str:
    if not isinstance(given, dict) or not isinstance(given.get(key), str):
        raise IntegrityError(f"{path} lacks {key!r}", got=str(given)[:80], fix=BUILD_FIX)
    return given[key]


def _vocabulary(given: dict) -> tuple[str, ...] | None:
    words = given.get("vocabulary")
    return tuple(words) if words else None


def backend_from_source(source: Source, asked: str, device: torch.device | str | None) -> Backend:
    """Open the backend asked for, or with "auto" the one that fits, and log which and why.

    Raises:
        UnavailableError: it cannot be had here.
        LongtakeError: there is no such backend.
    """
    if asked == ORACLE:
        module = importlib.import_module("longtake.runtime.backends.torch_oracle")
        return module.TorchBackend(source.recipe, device=torch.device(device or "cpu"))
    choice = choose_backend(source, asked)
    log.info("backend: %s (%s)", choice.backend, choice.reason)
    if choice.backend == "reference":
        from longtake.runtime.backends.reference import ReferenceBackend

        return ReferenceBackend(source.onnx, source.recipe, choice.reason)
    module = importlib.import_module(f"longtake.runtime.backends.{choice.backend}")
    return module.open_backend(source.engines, reason=choice.reason, device=torch.device(device or "cuda:0"))


def choose_backend(source: Source, asked: str) -> Choice:
    """The backend for `source` on this machine: the capability table's answer, and whether plans are there."""
    choice = backend_for(machine_here(), source.recipe, None if asked == "auto" else asked)
    if choice.backend == "reference" or source.engines is not None:
        return choice
    if asked != "auto":
        raise UnavailableError(f"backend {asked} has no plans for recipe {source.recipe.name}",
                               got=f"only exported networks in {source.onnx}",
                               fix=f"make engines RECIPE={source.recipe.name}")  # fmt: skip
    return Choice("reference", f"ONNX Runtime on the CPU, because no plans are built for {source.recipe.name}")
