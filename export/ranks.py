"""What one of several ranks runs of an exported model: graphs of their own, on the weights that lie there already.

A rank's matrices and filters are those of one GPU: only tokens, heads and rows are cut. So `dit_of2.onnx` is a few hundred
kilobytes that refer to the data file of `dit.onnx`, and nothing of the checkpoints is read again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx

from longtake.errors import IntegrityError
from longtake.export.files import is_reference
from longtake.export.lower import lower
from longtake.export.lower_conv8 import ConvCodes, lower_convs
from longtake.export.package import PlainGraphs, linears_of
from longtake.export.structure import Expected, check_structure
from longtake.files import atomic_path, sha256
from longtake.formats.exported import KIND, Export, ExportedFile, ExportedNetwork
from longtake.formats.onnx_file import INLINE_BYTES, read_onnx, tensor_bytes
from longtake.formats.recipe import Recipe
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import rank_network
from longtake.training.models.wan.vae_caches import rows_divide
from longtake.training.models.wan.vae_codes import coded_caches
from longtake.training.models.wan.vae_library import coded_ops

STEADY = "vae_steady"  # a stream's first step is made of its steps


def rank_graphs(recipe: Recipe, ranks: int) -> tuple[str, ...]:
    """The networks that one of `ranks` runs parts of: the DiT, and a decoder made of our ops, where its rows divide."""
    by_rows = recipe.vae_ops == "library" and rows_divide(recipe.model, ranks)
    return ("dit", STEADY) if by_rows else ("dit",)


def add_rank_graphs(graphs: PlainGraphs, recipe: Recipe, folder: Path, export: Export, ranks: int) -> Export:
    """Write the graphs of one of `ranks` beside the export in `folder`; the export with them, also written.

    Raises:
        IntegrityError: a graph wants a weight that the export lacks, or fails its structural check.
    """
    added = {}
    for network in rank_graphs(recipe, ranks):
        name = rank_network(ranks, network)
        path, model = folder / f"{name}.onnx", graphs.graph(name, recipe)
        spec = family_of(graphs.preset).spec(graphs.preset, recipe, name)
        expected = Expected(spec, recipe.precision, recipe.cache, ranks=ranks)
        lowering = _lower_dit if network == "dit" else _lower_decoder
        expected = lowering(graphs, recipe, export, model, expected)
        _take_weights(model, read_onnx(folder / f"{network}.onnx", "none"), path)
        with atomic_path(path) as partial:
            partial.write_bytes(model.SerializeToString(deterministic=True))
        check_structure(path, expected, skeleton=True)
        files = {path.name: ExportedFile(sha256(path), path.stat().st_size)}
        added[name] = ExportedNetwork(files, spec.as_json(), tuple(expected.linears))
    export = replace(export, networks={**export.networks, **added})
    export.write(folder)
    return export


def _lower_dit(
    graphs: PlainGraphs, recipe: Recipe, export: Export, model: onnx.ModelProto, expected: Expected
) -> Expected:
    library, shapes = recipe.linears == "library", linears_of(graphs.models, model, "dit")
    lowered = lower(model, recipe.precision, shapes, None if export.skeleton else export.amax, library)
    linears = {linear: shapes[linear] for linear in lowered}
    return replace(expected, layers=graphs.preset.dit.layers, linears=linears, library=library)


def _lower_decoder(
    graphs: PlainGraphs, recipe: Recipe, export: Export, model: onnx.ModelProto, expected: Expected
) -> Expected:
    codes = ConvCodes(export.vae_conv, None, coded_caches(graphs.preset.vae))
    lower_convs(model, codes, first=False)
    return replace(expected, streams=coded_ops(graphs.models.vae, export.vae_conv))


def _take_weights(model: onnx.ModelProto, whole: onnx.ModelProto, path: Path) -> None:
    """Give every reference of `model`, and every factor of calibrated codes, the place or the content that the tensor of its
    name has in `whole`."""
    known = {tensor.name: tensor for tensor in whole.graph.initializer}
    for tensor in model.graph.initializer:
        own = not is_reference(tensor) and not tensor.name.endswith("_factor")
        if own and tensor_bytes(tensor) <= INLINE_BYTES:
            continue
        source = known.get(tensor.name)
        if source is None or (source.data_type, list(source.dims)) != (tensor.data_type, list(tensor.dims)):
            raise IntegrityError(
                f"{path} cannot stand on the weights of the whole network",
                got=f"no {tensor.name} of {list(tensor.dims)} there",
                fix=KIND.remake,
            )
        tensor.CopyFrom(source)
