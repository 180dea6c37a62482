"""A rank's own graph, cut into segments, computes with the others what the whole network does; and what it is made of."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longtake.engines.segment import segments_from_onnx
from longtake.errors import IntegrityError
from longtake.export import ranks as rank_graphs
from longtake.export.files import is_reference, placeholder
from longtake.export.lower_conv8 import ConvCodes, lower_convs
from longtake.export.package import PlainGraphs, _export_network
from longtake.export.ranks import add_rank_graphs
from longtake.export.weights import weights_from_folder
from longtake.formats.exported import Export
from longtake.formats.onnx_file import INLINE_BYTES, read_onnx, tensor_bytes
from longtake.formats.recipe import recipe_named
from longtake.formats.segmented_graph import SegmentedGraph, Step
from longtake.paths import REPOSITORY
from longtake.plugins.exchange import GATHER_HEADS, GATHER_TOKENS
from longtake.plugins.registry import op_named
from longtake.training.models.families import family_of
from longtake.training.models.presets import TINY
from longtake.training.models.wan.vae_codes import chosen_codes, coded_caches

pytestmark = pytest.mark.slow
RECIPE = replace(recipe_named("tiny_w4a16_sm90"), vae_ops="library")
LIMIT_S = 400


def op_rows(step: Step) -> bool:
    """Whether it is a convolution that sees other rows."""
    return step.kind == "op" and op_named(step.name).kernel_size[1:2] in ((2,), (3,))


def upsampled(graph: SegmentedGraph) -> set[str]:
    """What upsampling makes, of rows that were renewed before it."""
    ups = [step for step in graph.steps if step.kind == "op" and op_named(step.name).repeats]
    return {step.outputs[0] for step in ups}


@pytest.fixture(scope="module")
def graphs() -> PlainGraphs:
    """Each plain graph is exported once."""
    return PlainGraphs(TINY)


@pytest.fixture(scope="module")
def folder(graphs: PlainGraphs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's DiT and decoder, exported, with the graphs of one of two and of one of four ranks."""
    place = tmp_path_factory.mktemp("onnx")
    weights = weights_from_folder(TINY, REPOSITORY / TINY.checkpoints)
    names = ("dit", "vae_steady")
    networks = {name: _export_network(graphs, RECIPE, name, place, lambda words: None, weights) for name in names}
    export = Export(RECIPE.onnx_name, "tiny", RECIPE.precision, RECIPE.cache, networks, (), amax=weights.amax)
    for ranks in (2, 4):
        export = add_rank_graphs(graphs, RECIPE, place, export, ranks)
    return place


def test_a_rank_has_its_tokens_and_heads_and_the_weights_of_the_whole(folder: Path) -> None:
    export = Export.read(folder)  # every digest
    assert list(export.networks) == [f"{n}{of}" for of in ("", "_of2", "_of4") for n in ("dit", "vae_steady")]
    assert (folder / "dit_of2.onnx").stat().st_size < 500_000
    whole = segments_from_onnx(read_onnx(folder / "dit.onnx", "small"), "dit").graph
    for ranks in (2, 4):
        own = segments_from_onnx(read_onnx(folder / f"dit_of{ranks}.onnx", "small"), f"dit_of{ranks}").graph
        assert own.weights == whole.weights and len(own.segments) == len(whole.segments)
        exchanges = [step for step in own.steps if step.kind == "exchange"]
        assert [step.name for step in exchanges] == [GATHER_TOKENS, GATHER_HEADS] * TINY.dit.layers
        tokens, heads = TINY.chunk_tokens, TINY.dit.heads
        for step in exchanges:
            mine, gathered = [(tokens // ranks, heads, 64)], [(tokens, heads // ranks, 64)]
            before, after = (mine, gathered) if step.name == GATHER_TOKENS else (gathered, mine)
            assert [own.tensors[n].shape for n in step.inputs] == before * len(step.inputs)
            assert [own.tensors[n].shape for n in step.outputs] == after * len(step.inputs)
        attention = next(step for step in own.steps if step.name == "sink_attention_nvfp4")
        assert own.tensors[attention.inputs[3]].shape == (4, 2, tokens, heads // ranks, 32)


def test_a_rank_has_its_rows_of_the_decoder_and_ghost_rows_that_are_renewed(folder: Path) -> None:
    """From the first upsampling on: 16 rows of 8, and as many ghost rows on either side as that doubles."""
    for ranks in (2, 4):
        name = f"vae_steady_of{ranks}"
        own = segments_from_onnx(read_onnx(folder / f"{name}.onnx", "small"), name).graph
        exchanges = [step for step in own.steps if step.kind == "exchange"]
        assert [step.name for step in exchanges if step.outputs] == ["take_rows"]
        ghosts = [int(step.name.removeprefix("halo_")) for step in exchanges[1:]]
        assert sorted(set(ghosts)) == [1, 2, 4] and ghosts == sorted(ghosts)
        for step, ghost in zip(exchanges[1:], ghosts, strict=True):
            assert own.tensors[step.inputs[0]].shape[1] == 16 * ghost // ranks + 2 * ghost
        seen = {name for step in own.steps for name in step.inputs if op_rows(step)}
        halos = {step.inputs[0] for step in exchanges if step.name.startswith("halo")}
        first = own.steps.index(exchanges[0])
        after = {step.inputs[0] for step in own.steps[first:] if op_rows(step)}
        assert after <= halos | upsampled(own) and seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_on_segments_compute_what_the_whole_network_does(folder: Path, ranks: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    script = str(Path(__file__).parent / "segments_at_work.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / "log", "wb") as log:
        words = [[sys.executable, script, str(rank), str(ranks), str(port), str(folder)] for rank in range(ranks)]
        running = [subprocess.Popen(command, env=env, stdout=log, stderr=log) for command in words]
        try:
            codes = [process.wait(LIMIT_S) for process in running]
        finally:
            for process in running:
                process.kill()
    assert codes == [0] * ranks, (folder / "log").read_text()[-3000:]
    found: dict[str, Any] = json.loads((folder / f"result_{ranks}.json").read_text())
    for commit in (False, True):
        assert found[f"velocity, commit {commit}"] <= 1e-5, found
    assert found["codes values"] >= 0.999 and found["codes scales"] >= 0.999, found
    assert max(found[f"frames {i}"] for i in range(4)) <= 1e-2 and found["histories"] <= 1e-5, found
    assert found["amax"] <= 1e-5 and found["written"] > 0.5 and found["elsewhere"] == 0, found


def test_rows_that_travel_are_codes_where_the_convolution_reads_codes(graphs: PlainGraphs, folder: Path) -> None:
    """And what was lowered like that is a decoder of as many coded convolutions, with histories of codes."""
    config = TINY.vae
    codes = ConvCodes(chosen_codes(config, "int8", None), None, coded_caches(config))
    model = graphs.graph("vae_steady_of2", RECIPE)
    lower_convs(model, codes, first=False)
    for tensor in model.graph.initializer:
        if is_reference(tensor) and tensor_bytes(tensor) <= INLINE_BYTES:
            tensor.ClearField("data_location")
            tensor.raw_data = placeholder(tensor)
    graph = segments_from_onnx(model, "vae_steady_of2").graph
    steps = list(graph.steps)
    coded = [step for step in steps if step.kind == "op" and op_named(step.name).codes and op_rows(step)]
    assert len(coded) > 10 and sum(step.name == "conv_1x3x3_up_int8" for step in coded) == 3
    halos = {step.inputs[0] for step in steps if step.kind == "exchange" and not step.outputs}
    made = {step.outputs[0]: step for step in steps if step.kind == "op"}
    for up in (step for step in coded if step.name == "conv_1x3x3_up_int8"):  # of its rows and ghost rows, doubled
        (t, rows, columns, _), out = graph.tensors[up.inputs[0]].shape, graph.tensors[up.outputs[0]].shape
        assert out[:3] == (t, 2 * rows, 2 * columns)
        assert made[up.inputs[0]].inputs[0] in halos or rows == TINY.latent_hw[0], "rows of others before it, or all"
    assert all(graph.tensors[step.inputs[0]].dtype == "int8" for step in coded)
    assert (
        sum(graph.tensors[name].dtype == "int8" for name in halos)
        == len(halos & {step.inputs[0] for step in coded})
        > 8
    )
    spec = family_of(TINY).spec(TINY, replace(RECIPE, vae_conv="int8"), "vae_steady_of2")
    kinds = {"bf16": "bf16", "int8": "int8"}
    assert all(graph.tensors[b.name].dtype == kinds[b.dtype] for b in spec.inputs if b.name.startswith("vae_cache"))
    assert all(graph.tensors[b.name].shape == b.shape for b in spec.inputs)


def test_a_graph_of_other_weights_is_refused(
    graphs: PlainGraphs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_onnx(folder / "dit.onnx", "none")
    del whole.graph.initializer[:]
    monkeypatch.setattr(rank_graphs, "read_onnx", lambda path, content: whole)
    with pytest.raises(IntegrityError, match="dit_of2.onnx cannot stand on the weights of the whole"):
        add_rank_graphs(graphs, RECIPE, folder, Export.read(folder), 2)
