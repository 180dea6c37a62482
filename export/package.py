"""The ONNX package of a recipe: a folder with every network, its view, and export.json.

export.json is removed before anything else is written and written last: a folder that has one is whole. A skeleton is
a package of graphs without weights and views: enough to build segmented engines and to measure with random weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx

from longtake import paths
from longtake.errors import LongtakeError, some
from longtake.export.files import is_reference, write_onnx, write_skeleton
from longtake.export.functions import attach_functions
from longtake.export.lower import lower
from longtake.export.lower_conv8 import ConvCodes, lower_convs
from longtake.export.onnx_from_model import OPSET, onnx_from_model
from longtake.export.ort_view import ort_view
from longtake.export.rewriter import linear_name
from longtake.export.structure import Expected, check_structure
from longtake.export.weights import Weights, stored_tensors
from longtake.files import atomic_path, require_disk, sha256
from longtake.formats.exported import KIND, NAME, UNFINISHED, Checked, Export, ExportedFile, ExportedNetwork
from longtake.formats.onnx_file import data_path, read_onnx, tensor_bytes
from longtake.formats.recipe import LINEARS, Recipe
from longtake.plugins.spec import PLUGIN_VERSION
from longtake.provenance import versions
from longtake.training.models.conv_calibration import ConvCalibration
from longtake.training.models.families import family_of
from longtake.training.models.load import Models, meta_models
from longtake.training.models.network_spec import shared_network
from longtake.training.models.presets import Preset
from longtake.training.models.wan.vae_codes import chosen_codes, codable_names, coded_caches
from longtake.training.models.wan.vae_library import coded_ops

LIBRARY_NETWORKS = ("dit",)  # a prompt's K and V (network "context") are made once, in the engine
DECODER = ("vae_first", "vae_steady")
PACKAGE = Path(paths.__file__).parent
SOURCES = ("export", "plugins", "training/models", "formats")  # what an export computes with, and this folder
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "nvidia-modelopt")
VIEW_BYTES = 1_900_000_000  # a view is one protobuf message, which must stay below 2 GiB
Progress = Callable[[str], None]
GraphKey = tuple[str, str, str, str]  # network, format of its cache, ops of the VAE, who computes linears


class PlainGraphs:
    """Plain bf16 graphs of a preset, each exported once: recipes differ in what is lowered afterwards."""

    def __init__(self, preset: Preset, vocabulary: tuple[str, ...] | None = None) -> None:
        self.preset = preset
        self.models = meta_models(preset, vocabulary)
        self._graphs: dict[GraphKey, onnx.ModelProto] = {}

    def graph(self, name: str, recipe: Recipe) -> onnx.ModelProto:
        """A copy of the graph of network `name` as `recipe` needs it; its weights are references."""
        kind = shared_network(name)
        ops = recipe.vae_ops if kind in DECODER else "engine"
        linears = recipe.linears if kind in LIBRARY_NETWORKS else LINEARS[0]
        key = name, recipe.cache if kind == "dit" else "", ops, linears
        if key not in self._graphs:
            self._graphs[key] = self._traced(key, replace(recipe, vae_conv="bf16"))  # which is lowered from the other
        model = onnx.ModelProto()
        model.CopyFrom(self._graphs[key])
        return model

    def _traced(self, key: GraphKey, recipe: Recipe) -> onnx.ModelProto:
        family = family_of(self.preset)
        module = family.module(self.models, recipe, key[0], exported=True)
        return onnx_from_model(module, family.spec(self.preset, recipe, key[0]))


def export_package(
    graphs: PlainGraphs,
    recipe: Recipe,
    folder: Path,
    inputs: str,
    progress: Progress,
    weights: Weights | None,
    checked: Checked = UNFINISHED,
) -> Export:
    """Export every network of `recipe` into `folder` and return its description (also written).

    Args:
        inputs: digest of checkpoints and code, kept to recognise a package that is up to date.
        progress: called with a few words before each step; `steps_of` says how often.
        weights: what the graphs' references are filled with; None exports a skeleton.
        checked: what is recorded of its comparison with PyTorch, which is yet to come.

    Raises:
        LongtakeError: not enough disk space, or a linear can't be lowered.
        IntegrityError: an exported file fails its structural check, or a weight is missing or of another shape.
    """
    require_disk(folder, disk_needed(graphs, recipe) if weights else 16 << 20)
    (folder / NAME).unlink(missing_ok=True)
    names = family_of(graphs.preset).networks(graphs.preset)
    networks = {name: _export_network(graphs, recipe, name, folder, progress, weights) for name in names}
    export = Export(
        onnx_name=recipe.onnx_name,
        preset=recipe.preset,
        precision=recipe.precision,
        cache=recipe.cache,
        networks=networks,
        vocabulary=weights.vocabulary if weights else (),
        linears=recipe.linears,
        opset=OPSET,
        plugin_version=PLUGIN_VERSION,
        inputs=inputs,
        skeleton=weights is None,
        amax=weights.amax if weights else {},
        vae_conv=dict(conv_codes(graphs.preset, recipe, weights).chosen),
        versions=versions(PACKAGES),
        recipe=recipe.whole,
        checked=checked,
    )
    export.write(folder)
    return export


def steps_of(preset: Preset) -> int:
    """How often `export_package` calls its progress."""
    return 3 * len(family_of(preset).networks(preset))


def _export_network(
    graphs: PlainGraphs, recipe: Recipe, name: str, folder: Path, progress: Progress, weights: Weights | None
) -> ExportedNetwork:
    """Export, lower, check and view one network."""
    spec = family_of(graphs.preset).spec(graphs.preset, recipe, name)
    path = folder / f"{name}.onnx"
    progress(f"{name}: PyTorch to ONNX")
    model = graphs.graph(name, recipe)
    shapes = linears_of(graphs.models, model, name)
    library = recipe.linears == "library" and name in LIBRARY_NETWORKS
    lowered = lower(model, recipe.precision, shapes, weights.amax if weights else None, library)
    codes = conv_codes(graphs.preset, recipe, weights) if name in DECODER else ConvCodes()
    lower_convs(model, codes, first=name == DECODER[0])
    attach_functions(model)
    if weights:
        content = stored_tensors(
            model, weights.of(name), recipe.precision, lowered, weights.amax, weights.formats, codes
        )
        write_onnx(model, path, content)
    else:
        write_skeleton(model, path)
    progress(f"{name}: structure")
    layers = graphs.preset.dit.layers if name == "dit" else 0
    streams = _decoder_ops(graphs.models, codes, name) if recipe.vae_ops == "library" else {}
    lowered_shapes = {n: shapes[n] for n in lowered}
    expected = Expected(spec, recipe.precision, recipe.cache, layers, lowered_shapes, library, streams)
    check_structure(path, expected, skeleton=weights is None)
    progress(f"{name}: view for ONNX Runtime")
    files = [path] if weights is None else [path, data_path(path), *_view(path)]
    described = {f.name: ExportedFile(sha256(f), f.stat().st_size) for f in files}
    return ExportedNetwork(described, spec.as_json(), tuple(lowered))


def conv_codes(preset: Preset, recipe: Recipe, weights: Weights | None) -> ConvCodes:
    """Which of the decoder's convolutions `recipe` runs in which codes, and with what scales.

    Raises:
        IntegrityError: the VAE is not calibrated, or its calibration is of another one, or of no use.
    """
    if recipe.vae_conv == "bf16":
        return ConvCodes()
    calibration = weights.convs or ConvCalibration() if weights else None
    if calibration is not None:
        calibration.require(codable_names(preset.vae), "")
    chosen = chosen_codes(preset.vae, recipe.vae_conv, calibration)
    return ConvCodes(chosen, calibration, coded_caches(preset.vae))


def _decoder_ops(models: Models, codes: ConvCodes, name: str) -> Counter[str]:
    """How many nodes of each op one of the decoder's networks must hold."""
    if name == "vae_steady":
        return coded_ops(models.vae, codes.chosen)
    kept = [codes.chosen[conv] for conv in codes.caches if conv in codes.chosen] if name == "vae_first" else []
    return Counter(f"encode_{each}" for each in kept)


def _view(path: Path) -> list[Path]:
    """Write the view of an ONNX file if it fits into one message; its path, or nothing."""
    if view_bytes(read_onnx(path, "none")) > VIEW_BYTES:
        view_path(path).unlink(missing_ok=True)
        return []
    with atomic_path(view_path(path)) as partial:
        partial.write_bytes(ort_view(read_onnx(path)).SerializeToString(deterministic=True))
    return [view_path(path)]


def view_bytes(model: onnx.ModelProto) -> int:
    """About how large the view of `model` is: bf16 weights become fp32, FP4 ones FP8."""
    wider = {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT4E2M1}
    return sum(tensor_bytes(t) * (2 if t.data_type in wider else 1) for t in model.graph.initializer)


def view_path(path: Path) -> Path:
    """The ONNX Runtime view beside an ONNX file: `dit.onnx` has `dit.ort.onnx`."""
    return path.with_suffix(".ort.onnx")


def linears_of(models: Models, model: onnx.ModelProto, network: str) -> dict[str, tuple[int, int]]:
    """The DiT's quantized linears that `network` has, with their (N, K), as found in its graph `model`.

    Raises:
        LongtakeError: one of them is no Gemm there, and would be left as it is without a word.
    """
    family = family_of(models.preset)
    linears = family.linears(models.dit)
    names = [name for name in map(linear_name, model.graph.node) if name in set(linears)]
    wanted = {name for name in linears if family.network_of(name) == network}
    if missing := sorted(wanted.difference(names)):
        raise LongtakeError(
            f"the graph of {network} does not show every linear that recipes quantize",
            got=f"no Gemm of {some(missing, 3)}",
            expected=f"{len(wanted)} Gemms",
            fix="let the family's module multiply matrices of two dimensions there",
        )
    return {name: tuple(models.dit.get_parameter(f"{name}.weight").shape) for name in names}  # type: ignore[misc]


def disk_needed(graphs: PlainGraphs, recipe: Recipe) -> int:
    """An upper bound of a package's size in bytes: bf16 graph files and fp32 views of every network."""
    total = 16 << 20
    for name in family_of(graphs.preset).networks(graphs.preset):
        model = graphs.graph(name, recipe)
        stored = sum(tensor_bytes(t) for t in model.graph.initializer if is_reference(t))
        total += stored + (2 * stored if view_bytes(model) <= VIEW_BYTES else 0)
    return total


def code_digest() -> str:
    """Digest of the sources an export depends on: a package exported by other code is not up to date."""
    digest = hashlib.sha256()
    folders = [file for source in SOURCES for file in (PACKAGE / source).rglob("*.py")]
    for file in sorted([*PACKAGE.glob("*.py"), *folders]):
        digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def inputs_digest(recipe: Recipe, checkpoints: Path | None) -> str:
    """Digest of everything an export reads: recipe fields, checkpoint files (None: a skeleton), code and versions."""
    how = recipe.precision, recipe.cache, recipe.linears, recipe.vae_ops, recipe.vae_conv
    fields = KIND.format, recipe.model, *how, versions(PACKAGES)
    digest = hashlib.sha256(repr(fields).encode())
    digest.update(code_digest().encode())
    if checkpoints is not None:
        for file in sorted([*checkpoints.glob("*.safetensors"), *checkpoints.glob("*.json")]):
            digest.update(f"{file.name}\0{sha256(file)}".encode())
    return digest.hexdigest()
