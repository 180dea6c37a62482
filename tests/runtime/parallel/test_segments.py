"""A rank's own graph, cut into segments, computes with the others what the whole network does; and what it is made of."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longtake.engines.segment import segments_from_onnx
from longtake.errors import IntegrityError
from longtake.export import ranks as rank_graphs
from longtake.export.package import PlainGraphs, _export_network
from longtake.export.ranks import add_rank_graph
from longtake.export.weights import weights_from_folder
from longtake.formats.exported import Export
from longtake.formats.onnx_file import read_onnx
from longtake.formats.recipe import recipe_named
from longtake.paths import REPOSITORY
from longtake.plugins.exchange import GATHER_HEADS, GATHER_TOKENS
from longtake.training.models.presets import TINY

pytestmark = pytest.mark.slow
RECIPE = recipe_named("tiny_w4a16_sm90")
LIMIT_S = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's DiT, exported, with the graphs of one of two and of one of four ranks."""
    place = tmp_path_factory.mktemp("onnx")
    weights, graphs = weights_from_folder(TINY, REPOSITORY / TINY.checkpoints), PlainGraphs(TINY)
    dit = _export_network(graphs, RECIPE, "dit", place, lambda words: None, weights)
    export = Export(RECIPE.onnx_name, "tiny", RECIPE.precision, RECIPE.cache, {"dit": dit}, (), amax=weights.amax)
    for ranks in (2, 4):
        export = add_rank_graph(graphs, RECIPE, place, export, ranks)
    return place


def test_a_rank_has_its_tokens_and_heads_and_the_weights_of_the_whole(folder: Path) -> None:
    export = Export.read(folder)  # every digest
    assert list(export.networks) == ["dit", "dit_of2", "dit_of4"]
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
    assert found["amax"] <= 1e-5 and found["written"] > 0.5 and found["elsewhere"] == 0, found


def test_a_graph_of_other_weights_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_onnx(folder / "dit.onnx", "none")
    del whole.graph.initializer[:]
    monkeypatch.setattr(rank_graphs, "read_onnx", lambda path, content: whole)
    with pytest.raises(IntegrityError, match="dit_of2.onnx cannot stand on the weights of dit.onnx"):
        add_rank_graph(PlainGraphs(TINY), RECIPE, folder, Export.read(folder), 2)
