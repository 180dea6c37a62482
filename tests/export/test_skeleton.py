"""Exports without weights, content that is read one tensor at a time, and the 5B model in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from held_weights import weights_from_models

from longtake.accuracy.compare import compare_networks
from longtake.engines.segment import segments_from_onnx
from longtake.errors import IntegrityError, LongtakeError
from longtake.export import package as package_module
from longtake.export.files import write_onnx
from longtake.export.package import PlainGraphs, export_package
from longtake.export.weights import stored_tensors, weights_from_folder
from longtake.formats.exported import Export
from longtake.formats.onnx_file import INLINE_BYTES, data_path, read_onnx, tensor_bytes
from longtake.formats.recipe import recipe_named
from longtake.training.models.load import Models, load_models
from longtake.training.models.presets import PRESETS, TINY, WAN22_TI2V_5B
from longtake.training.models.wan.spec import networks_of
from longtake.training.random_weights import write_random_checkpoints


@pytest.fixture(scope="module")
def skeleton(small_graphs: PlainGraphs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skeleton")
    export_package(small_graphs, recipe_named("tiny_w4a16_sm90"), folder, "inputs", lambda words: None, None)
    return folder


def test_a_skeleton_is_the_graph_of_the_full_export(skeleton: Path, package) -> None:  # type: ignore[no-untyped-def]
    """Same nodes, same names, types, shapes and places of weights; only small content differs, and no data is there."""
    full = package("w4a16")[2]
    for name in networks_of(TINY):
        one, other = (onnx.load(folder / f"{name}.onnx", load_external_data=False) for folder in (skeleton, full))
        assert list(one.graph.node) == list(other.graph.node) and not data_path(skeleton / f"{name}.onnx").exists()
        for got, wanted in zip(one.graph.initializer, other.graph.initializer, strict=True):
            assert (got.name, got.data_type, got.dims) == (wanted.name, wanted.data_type, wanted.dims)
            assert got.data_location == wanted.data_location and got.external_data == wanted.external_data
            assert (tensor_bytes(got) > INLINE_BYTES) == (got.data_location == onnx.TensorProto.EXTERNAL)


def test_segments_of_a_skeleton_are_those_of_the_full_export(skeleton: Path, package) -> None:  # type: ignore[no-untyped-def]
    cuts = [
        segments_from_onnx(read_onnx(f / "dit.onnx", "small"), "dit").graph for f in (skeleton, package("w4a16")[2])
    ]
    assert cuts[0] == cuts[1]


def test_a_skeleton_is_no_package_to_run(skeleton: Path) -> None:
    with pytest.raises(LongtakeError, match=r"have no weights[\s\S]*fix: longtake export .*--checkpoints FOLDER"):
        Export.read(skeleton).require_recipe(recipe_named("tiny_w4a16_sm90"), skeleton)
    Export.read(skeleton).require_recipe(recipe_named("tiny_w4a16_sm90"), skeleton, weights=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    write_random_checkpoints(TINY, folder, seed=3)
    return folder


def test_random_checkpoints_load_and_differ_by_seed(checkpoints: Path, tmp_path: Path) -> None:
    models = load_models(TINY, checkpoints)
    weight = models.dit.blocks[0].ffn[0].weight  # type: ignore[union-attr, index]
    assert float(weight.std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    assert models.amax["blocks.0.ffn.0"]["weight"] == pytest.approx(float(weight.abs().max()), rel=0.01)
    for seed, same in ((3, True), (4, False)):
        (path,) = write_random_checkpoints(TINY, tmp_path / str(seed), seed, ["vae"])
        assert (path.read_bytes() == (checkpoints / "vae.safetensors").read_bytes()) is same


def test_weights_from_files_and_from_models_are_stored_alike(checkpoints: Path, small_graphs: PlainGraphs) -> None:
    model = small_graphs.graph("dit", recipe_named("tiny_bf16_sm89"))
    lazy, held = weights_from_folder(TINY, checkpoints), weights_from_models(load_models(TINY, checkpoints))
    assert lazy.amax == held.amax and lazy.vocabulary == held.vocabulary
    pairs = zip(*(stored_tensors(model, w.of("dit"), "bf16", [], {}) for w in (lazy, held)), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_an_altered_checkpoint_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    for path in checkpoints.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "vae.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "vae.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="vae.safetensors is not the file its side file describes"):
        weights_from_folder(TINY, tmp_path)


def test_content_that_does_not_fit_leaves_no_file(
    small_models: Models, small_graphs: PlainGraphs, tmp_path: Path
) -> None:
    recipe, state = recipe_named("tiny_bf16_sm89"), dict(small_models.dit.state_dict())
    model = small_graphs.graph("context", recipe)
    del state["text_embedding.0.weight"]
    with pytest.raises(IntegrityError, match="the checkpoint lacks text_embedding.0.weight"):
        write_onnx(model, tmp_path / "context.onnx", stored_tensors(model, state, "bf16", [], {}))
    model = small_graphs.graph("context", recipe)
    state["text_embedding.0.weight"] = torch.zeros(2, 2)
    with pytest.raises(IntegrityError, match="text_embedding.0.weight has another shape than the graph"):
        write_onnx(model, tmp_path / "context.onnx", stored_tensors(model, state, "bf16", [], {}))
    model = small_graphs.graph("context", recipe)
    with pytest.raises(LongtakeError, match="no content for"):
        write_onnx(model, tmp_path / "context.onnx")
    assert not list(tmp_path.iterdir())


FULL_WIDTH = """
import json, resource, sys, time
from dataclasses import replace
from pathlib import Path
from longtake.formats.onnx_file import INLINE_BYTES, data_path, read_onnx, tensor_bytes
from longtake.formats.recipe import recipe_named
from longtake.engines.segment import segments_from_onnx
from longtake.export import package
start = time.monotonic()
recipe = recipe_named("wan2.2-ti2v-5b_w4a16_sm90")
preset = replace(recipe.model, dit=replace(recipe.model.dit, layers=int(sys.argv[2])))
folder = Path(sys.argv[1])
package._export_network(package.PlainGraphs(preset), recipe, "dit", folder, lambda words: None, None)
cut = segments_from_onnx(read_onnx(folder / "dit.onnx", "small"), "dit").graph
status = Path("/proc/self/status").read_text()  # its own peak: getrusage tells that of the process it was forked from, too
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
print(json.dumps({"segments": len(cut.segments), "peak": peak, "seconds": time.monotonic() - start}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 4])
def test_the_5b_transformer_exports_without_its_weights(tmp_path: Path, layers: int) -> None:
    """Full width, no memory for weights, and as many plans as there are kinds of layers, however many layers."""
    command = [sys.executable, "-c", FULL_WIDTH, str(tmp_path), str(layers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["peak"] < 3e9 and found["seconds"] < 60, found
    assert found["segments"] == 2
    shapes = {
        t.name: tuple(t.dims) for t in onnx.load(tmp_path / "dit.onnx", load_external_data=False).graph.initializer
    }
    assert shapes["blocks.1.ffn.0.weight.values"] == (14336, 1536)


def test_the_check_preset_has_the_real_linears() -> None:
    check = PRESETS["wan2.2-ti2v-5b-check"]
    assert check.dit == replace(WAN22_TI2V_5B.dit, layers=check.dit.layers)


@pytest.mark.parametrize("ops", ("engine", pytest.param("library", marks=pytest.mark.slow)))
def test_a_vae_agrees_with_pytorch_whoever_runs_it(
    small_models: Models, small_graphs: PlainGraphs, tmp_path: Path, ops: str
) -> None:
    recipe = replace(recipe_named("tiny_bf16_sm90"), vae_ops=ops)
    weights = weights_from_models(small_models)
    for name in ("vae_first", "vae_steady"):
        package_module._export_network(small_graphs, recipe, name, tmp_path, lambda words: None, weights)
    rows = list(compare_networks(small_models, recipe, tmp_path, networks=["vae_first", "vae_steady"]))
    assert rows and all(row.error < 1e-5 for row in rows)
