"""The ONNX package of a recipe: export/build/<onnx_name>/ with every network, its view, and export.json.

export.json is removed before anything else is written and written last: a folder that has one is whole.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import torch

from longtake.engines.recipe import Recipe
from longtake.engines.spec import NETWORKS, network_spec
from longtake.export.files import data_path, read_onnx, write_onnx
from longtake.export.functions import attach_functions
from longtake.export.lower import linear_name, lower
from longtake.export.onnx_from_model import OPSET, onnx_from_model
from longtake.export.ort_view import ort_view
from longtake.export.structure import Expected, check_structure
from longtake.plugins.spec import PLUGIN_VERSION
from longtake.runtime.errors import IntegrityError, LongtakeError
from longtake.runtime.files import atomic_path, read_json, require_disk, sha256, write_json
from longtake.runtime.places import REPOSITORY
from longtake.training.networks import Models, network_module, quantized_linears

FORMAT = 1
INDEX = "export.json"
SOURCES = ("export", "plugins", "engines/spec.py", "training/dit.py", "training/vae.py", "training/text_encoder.py")
Progress = Callable[[str], None]


class PlainGraphs:
    """Plain bf16 graphs of some models, each exported once: recipes differ in what is lowered afterwards."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._made: dict[tuple[str, str], onnx.ModelProto] = {}

    def graph(self, name: str, cache: str) -> onnx.ModelProto:
        """A copy of the graph of network `name` for cache format `cache`."""
        key = name, cache if name == "dit" else ""
        if key not in self._made:
            spec = network_spec(self.models.preset, cache, name)
            self._made[key] = onnx_from_model(network_module(self.models, name, cache), spec)
        model = onnx.ModelProto()
        model.CopyFrom(self._made[key])
        return model


def export_package(
    graphs: PlainGraphs, recipe: Recipe, folder: Path, inputs: str, progress: Progress
) -> dict[str, Any]:
    """Export every network of `recipe` into `folder` and return what export.json holds (also written).

    Args:
        inputs: digest of checkpoints and code, kept to recognise a package that is up to date.
        progress: called with a few words before each step; `steps_of` says how often.

    Raises:
        LongtakeError: not enough disk space, or a linear can't be lowered.
        IntegrityError: an exported file fails its structural check.
    """
    models = graphs.models
    require_disk(folder, disk_needed(models))
    (folder / INDEX).unlink(missing_ok=True)
    networks = {name: _export_network(graphs, recipe, name, folder, progress) for name in NETWORKS}
    index = {
        "format": FORMAT,
        "onnx_name": recipe.onnx_name,
        "preset": recipe.preset,
        "precision": recipe.precision,
        "cache": recipe.cache,
        "opset": OPSET,
        "plugin_version": PLUGIN_VERSION,
        "inputs": inputs,
        "networks": networks,
        "amax": models.amax,
        "vocabulary": list(models.vocabulary),
        "versions": versions(),
        "parity": [],
    }
    write_json(folder / INDEX, index)
    return index


def steps_of(networks: int = len(NETWORKS)) -> int:
    """How often `export_package` calls its progress."""
    return 3 * networks


def _export_network(graphs: PlainGraphs, recipe: Recipe, name: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """Export, lower, check and view one network; the entry of export.json."""
    models = graphs.models
    spec = network_spec(models.preset, recipe.cache, name)
    path = folder / f"{name}.onnx"
    progress(f"{name}: PyTorch to ONNX")
    model = graphs.graph(name, recipe.cache)
    weights = {n: models.dit.get_parameter(f"{n}.weight") for n in linears_of(models, model)}
    lowered = lower(model, recipe.precision, weights, models.amax)
    attach_functions(model)
    write_onnx(model, path)
    progress(f"{name}: structure")
    shapes = {n: (weights[n].shape[0], weights[n].shape[1]) for n in lowered}
    layers = models.preset.dit.layers if name == "dit" else 0
    check_structure(path, Expected(spec, recipe.precision, recipe.cache, layers, shapes))
    progress(f"{name}: view for ONNX Runtime")
    with atomic_path(view_path(path)) as partial:
        partial.write_bytes(ort_view(read_onnx(path)).SerializeToString(deterministic=True))
    files = [path, data_path(path), view_path(path)]
    return {
        "spec": spec.as_json(),
        "linears": lowered,
        "files": {f.name: {"sha256": sha256(f), "bytes": f.stat().st_size} for f in files},
    }


def view_path(path: Path) -> Path:
    """The ONNX Runtime view beside an ONNX file: `dit.onnx` has `dit.ort.onnx`."""
    return path.with_suffix(".ort.onnx")


def linears_of(models: Models, model: onnx.ModelProto) -> list[str]:
    """The DiT's quantized linears that `model` contains."""
    own = set(quantized_linears(models.dit))
    return [name for name in map(linear_name, model.graph.node) if name in own]


def disk_needed(models: Models) -> int:
    """An upper bound of a package's size in bytes: bf16 graph files, fp32 views, and one file being replaced."""
    parameters = sum(p.numel() for m in (models.dit, models.vae, models.text) for p in m.parameters())
    return 10 * parameters + (16 << 20)


def load_index(folder: Path) -> dict[str, Any]:
    """Read and check a package: export.json and the digest of every file it names.

    Raises:
        LongtakeError: there is no package.
        IntegrityError: a file is missing or differs from what was exported.
    """
    if not (folder / INDEX).is_file():
        raise LongtakeError(f"{folder} holds no exported model", expected=f"{INDEX} in it", fix="run `longtake export`")
    index = read_json(folder / INDEX)
    for name, expected in _digests(index, folder / INDEX).items():
        path = folder / name
        got = sha256(path) if path.is_file() else "no file"
        if got != expected:
            raise IntegrityError(
                f"{path} is not what was exported", got=got, expected=expected, fix="run `longtake export --force`"
            )
    return index


def _digests(index: Any, path: Path) -> dict[str, str]:
    """{file name: sha256} of export.json's content `index`, which is checked for what its readers rely on."""
    try:
        if index["format"] != FORMAT:
            raise IntegrityError(f"{path} has another format", got=index["format"], expected=FORMAT,
                                 fix="run `longtake export --force`")  # fmt: skip
        if not all(isinstance(word, str) for word in index["vocabulary"]):
            raise TypeError("the vocabulary is no list of words")
        files = [network["files"] for network in index["networks"].values()]
        return {Path(name).name: entry["sha256"] for group in files for name, entry in group.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path} is no export description", got=f"{type(error).__name__}: {error}",
            expected="what `longtake export` writes", fix="run `longtake export --force`",
        ) from None  # fmt: skip


def require_recipe(index: dict[str, Any], folder: Path, recipe: Recipe) -> None:
    """Raise LongtakeError if the package in `folder`, described by `index`, is of another recipe or not complete."""
    given = {key: index.get(key) for key in ("preset", "precision", "cache")}
    wanted = {"preset": recipe.preset, "precision": recipe.precision, "cache": recipe.cache}
    fix = f"longtake export --recipe {recipe.name}"
    if given != wanted:
        raise LongtakeError(f"the networks in {folder} are of another recipe", got=given, expected=wanted, fix=fix)
    missing = [name for name in NETWORKS if name not in index["networks"]]
    if missing:
        raise IntegrityError(f"{folder} lacks networks", got=f"no {', '.join(missing)}", expected=", ".join(NETWORKS),
                             fix=f"{fix} --force")  # fmt: skip


def versions() -> dict[str, str]:
    """Versions the files depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("onnx", "onnxscript", "onnxruntime", "nvidia-modelopt"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def code_digest() -> str:
    """Digest of the sources an export depends on: a package exported by other code is not up to date."""
    root, digest = REPOSITORY, hashlib.sha256()
    for source in SOURCES:
        place = root / source
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def inputs_digest(recipe: Recipe, checkpoints: Path) -> str:
    """Digest of everything an export reads: recipe fields, checkpoint files, code and versions."""
    digest = hashlib.sha256(repr((FORMAT, recipe.model, recipe.precision, recipe.cache, versions())).encode())
    digest.update(code_digest().encode())
    for file in sorted([*checkpoints.glob("*.safetensors"), *checkpoints.glob("*.json")]):
        digest.update(f"{file.name}\0{sha256(file)}".encode())
    return digest.hexdigest()
