"""What one of several ranks runs of an exported transformer: a graph of its own, on the weights that lie there already.

A rank's matrices are those of one GPU: only tokens and heads are cut. So `dit_of2.onnx` is a few hundred kilobytes that
refer to the data file of `dit.onnx`, and nothing of the checkpoints is read again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx

from longtake.errors import IntegrityError
from longtake.export.files import is_reference
from longtake.export.lower import lower
from longtake.export.package import PlainGraphs, linears_of
from longtake.export.structure import Expected, check_structure
from longtake.files import atomic_path, sha256
from longtake.formats.exported import KIND, Export, ExportedFile, ExportedNetwork
from longtake.formats.onnx_file import INLINE_BYTES, read_onnx, tensor_bytes
from longtake.formats.recipe import Recipe
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import rank_network


def add_rank_graph(graphs: PlainGraphs, recipe: Recipe, folder: Path, export: Export, ranks: int) -> Export:
    """Write the graph of one of `ranks` beside the export in `folder`; the export with it, also written.

    Raises:
        IntegrityError: the graph wants a weight that the export lacks, or fails its structural check.
    """
    name = rank_network(ranks)
    path, library = folder / f"{name}.onnx", recipe.linears == "library"
    model = graphs.graph(name, recipe)
    shapes = linears_of(graphs.models, model, "dit")
    lowered = lower(model, recipe.precision, shapes, None if export.skeleton else export.amax, library)
    _take_weights(model, read_onnx(folder / "dit.onnx", "none"), path)
    with atomic_path(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))
    spec = family_of(graphs.preset).spec(graphs.preset, recipe, name)
    linears = {linear: shapes[linear] for linear in lowered}
    layers = graphs.preset.dit.layers
    check_structure(
        path, Expected(spec, recipe.precision, recipe.cache, layers, linears, library, ranks=ranks), skeleton=True
    )
    network = ExportedNetwork(
        {path.name: ExportedFile(sha256(path), path.stat().st_size)}, spec.as_json(), tuple(lowered)
    )
    export = replace(export, networks={**export.networks, name: network})
    export.write(folder)
    return export


def _take_weights(model: onnx.ModelProto, whole: onnx.ModelProto, path: Path) -> None:
    """Give every reference of `model` the place, or the content, that the tensor of its name has in `whole`."""
    known = {tensor.name: tensor for tensor in whole.graph.initializer}
    for tensor in model.graph.initializer:
        if not is_reference(tensor) and tensor_bytes(tensor) <= INLINE_BYTES:
            continue
        source = known.get(tensor.name)
        if source is None or (source.data_type, list(source.dims)) != (tensor.data_type, list(tensor.dims)):
            raise IntegrityError(
                f"{path} cannot stand on the weights of dit.onnx",
                got=f"no {tensor.name} of {list(tensor.dims)} there",
                fix=KIND.remake,
            )
        tensor.CopyFrom(source)
