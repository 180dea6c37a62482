"""`longtake check`: errors output by output, layer by layer and chunk by chunk, and what a failed gate does."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longtake.accuracy.compare import compare_networks
from longtake.accuracy.layers import BLOCK, layer_tensors
from longtake.accuracy.rows import Row, kind_of, require_gate, table
from longtake.accuracy.ssim import ssim
from longtake.commands import check as check_cli
from longtake.errors import GateError, LongtakeError
from longtake.formats.onnx_file import read_onnx
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.check.chunks import ChunkRow, check_chunks, require_chunks
from longtake.runtime.check.report import write_report
from longtake.runtime.check.runners import BackendRunner
from longtake.runtime.generator import Generator
from longtake.runtime.sources import Source
from longtake.training.models.load import Models
from longtake.training.models.presets import PRESETS, SamplingConfig


@pytest.fixture
def small(package, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """(models, recipe of the small preset, folder) of the w4a16 package."""
    models, recipe, folder = package("w4a16")
    monkeypatch.setitem(PRESETS, "small", models.preset)
    return models, replace(recipe, preset="small"), folder


def test_outputs_and_layers_agree_with_pytorch(small: tuple[Models, Recipe, Path]) -> None:
    models, recipe, folder = small
    rows = list(compare_networks(models, recipe, folder, layers=True, networks=("dit", "vae_first")))
    found = {row.output for row in rows if row.network == "dit"}
    assert {"velocity", "cache_0", "cache_1", "blocks.0", "blocks.1", "blocks.1.ffn.2", "head.head"} <= found
    assert any(row.output == "decoder.conv_out.conv" and row.layer for row in rows)
    assert {row.case for row in rows if row.output == "blocks.0"} >= {"first chunk", "full window"}
    worst = max((row for row in rows if "cache" not in row.output), key=lambda row: row.error)
    assert worst.error < 1e-4, worst
    require_gate(rows, "test")


def test_an_error_shows_where_it_begins(small: tuple[Models, Recipe, Path]) -> None:
    """Weights that changed after the export: they are named, block 0 still agrees, block 1 and the velocity do not."""
    models, recipe, folder = small
    changed = replace(models, dit=_with_scaled_bias(models, "blocks.1.ffn.2", 5.0))
    rows = list(compare_networks(changed, recipe, folder, layers=True, networks=("dit",)))
    first = [row for row in rows if row.case == "first chunk"]
    error = {row.output: row.error for row in first}
    assert error["blocks.0"] < 1e-4 < 0.03 < error["blocks.1"]
    with pytest.raises(GateError, match="dit, as stored, blocks.1.ffn.2.bias: relative error"):
        require_gate(rows, "test")
    with pytest.raises(
        GateError, match=r"(?s)comparisons fail the accuracy gate.*dit, .*longtake check --layers"
    ) as caught:
        require_gate([row for row in rows if not row.stored], "test")
    assert caught.value.exit_code == 5


def _with_scaled_bias(models: Models, name: str, offset: float) -> torch.nn.Module:
    import copy

    dit = copy.deepcopy(models.dit)
    with torch.no_grad():
        dit.get_submodule(name).bias.add_(offset)  # type: ignore[operator, union-attr]
    return dit


def test_a_backend_is_one_more_runner(small: tuple[Models, Recipe, Path]) -> None:
    """Every network of a backend, with caches and decoder state set from the same feeds."""
    models, recipe, folder = small
    rows = list(compare_networks(models, recipe, folder, backend=partial(BackendRunner, TorchBackend(recipe, models))))
    own = [row for row in rows if row.against == "torch"]
    assert {row.network for row in own} == {
        "text_encoder",
        "context",
        "dit",
        "vae_first",
        "vae_steady",
        "vae_encoder_first",
        "vae_encoder_steady",
    }
    assert {row.output for row in own if row.network == "dit"} == {"velocity", "cache_0", "cache_1"}
    assert max(row.error for row in own if "cache" not in row.output) < 2e-2
    require_gate(own, "test")


@pytest.mark.parametrize("precision", ["bf16", "w4a16", "nvfp4"])
def test_every_block_and_linear_is_found_in_each_precision(package, precision: str) -> None:  # type: ignore[no-untyped-def]
    models, _, folder = package(precision)
    found = layer_tensors(read_onnx(folder / "dit.ort.onnx"))
    linears = {f"blocks.{i}.{n}" for i in range(2) for n in ("self_attn.q", "self_attn.o", "cross_attn.o", "ffn.0")}
    assert linears | {"blocks.0", "blocks.1", "head.head"} <= set(found)
    assert len(set(found.values())) == len(found)
    assert set(filter(BLOCK.fullmatch, found)) == {"blocks.0", "blocks.1"}


class Shifted(TorchBackend):
    """A backend whose velocity is off by `shift`."""

    name, shift = "shifted", 0.0

    def run(self, network: str, inputs: Any, state: Any = None, commit: bool = True) -> Any:
        outputs = super().run(network, inputs, state, commit)
        return {"velocity": outputs["velocity"] + self.shift} if network == "dit" else outputs


def test_chunks_are_compared_from_the_same_state(small: tuple[Models, Recipe, Path]) -> None:
    models, recipe, _ = small
    tokenize = check_cli.models_tokenizer(models)
    reference, candidate = TorchBackend(recipe, models), Shifted(recipe, models)

    def compared(chunks: int) -> list[ChunkRow]:
        pair = Generator(candidate, tokenize), Generator(reference, tokenize)
        script = ["a green seven", "a red two"][:chunks]
        return list(check_chunks(*pair, script, recipe.gate, None, steps=1, guidance=1.0))

    same = compared(2)
    assert [(row.chunk, row.ssim, row.latent_error) for row in same] == [(0, 1.0, 0.0), (1, 1.0, 0.0)]
    candidate.shift = 2.0
    other = compared(1)
    assert all(row.latent_error > 0.1 for row in other)
    with pytest.raises(GateError, match=r"(?s)1 of 1 chunks fail.*SSIM.*at least 0.98"):
        require_chunks([replace(row, gate=0.98, ssim=0.5) for row in other], recipe)


def test_ssim_equals_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (2, 32, 40, 3), np.uint8)
    other = np.clip(one.astype(int) + rng.integers(-40, 40, one.shape), 0, 255).astype(np.uint8)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    for mine, a, b in zip(ssim(one, other), one, other):
        assert mine == pytest.approx(metrics.structural_similarity(a, b, data_range=255, **settings), abs=2e-3)
    assert ssim(one, one).tolist() == [1.0, 1.0]


def test_ssim_of_other_sizes_is_an_error() -> None:
    with pytest.raises(LongtakeError, match="clips of different shape"):
        ssim(np.zeros((1, 16, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.uint8))


def test_not_a_number_fails_the_gate() -> None:
    row = Row("dit", "full window", "velocity", "ONNX Runtime", float("nan"), float("nan"), 0.03)
    assert not row.passed
    assert "FAIL" in "\n".join(table([row]))


def test_tables_show_the_worst_case_of_a_kind() -> None:
    rows = [Row("context", "a prompt", f"context_{i}", "ONNX Runtime", e, e, 0.03) for i, e in enumerate((1e-7, 2e-3))]
    assert kind_of(rows[0]) == "context"
    text = table(rows)
    assert len(text) == 2 and "2.00e-03" in text[1] and text[1].endswith("ok")


def _args(report: Path, **given: Any) -> check_cli.CheckOptions:
    return check_cli.CheckOptions(recipe="tiny_w4a16_sm89", report=report, **given)


@pytest.fixture
def command(small: tuple[Models, Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`longtake check` over the small package."""
    models, recipe, folder = small
    backend = TorchBackend(recipe, models)
    backend.name = "reference"
    monkeypatch.setattr(check_cli, "recipe_named", lambda name: recipe)
    monkeypatch.setattr(check_cli, "source_from_name", lambda name: Source(recipe, folder, None, None))
    monkeypatch.setattr(check_cli, "load_models", lambda preset, checkpoints: models)
    monkeypatch.setattr(check_cli, "backend_from_source", lambda *_, **__: backend)
    monkeypatch.setattr(Recipe, "onnx_name", "tiny_w4a16")


@pytest.mark.usefixtures("command")
def test_command_writes_a_report_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_cli.run(_args(tmp_path / "check.json")) == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert (report["kind"], report["passed"], report["recipe"]) == ("check", True, "tiny_w4a16_sm89")
    assert report["resolution"] and report["versions"]["torch"] and report["gate"]["dit"] == 0.03
    assert {"velocity", "frames", "embeddings"} <= {row["output"] for row in report["comparisons"]}
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "velocity" in text and "check.json" in text and "FAIL" not in text


@pytest.mark.usefixtures("command")
def test_a_failing_gate_exits_with_5_and_still_writes_the_report(
    small: tuple[Models, Recipe, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, recipe, _ = small
    strict = replace(recipe, gate=replace(recipe.gate, vae=1e-12))
    monkeypatch.setattr(check_cli, "recipe_named", lambda name: strict)
    with pytest.raises(GateError, match="fail the accuracy gate") as caught:
        check_cli.run(_args(tmp_path / "check.json"))
    assert caught.value.exit_code == 5
    assert "vae_" in str(caught.value) and "at most 1e-12" in str(caught.value)
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is False
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.usefixtures("command")
def test_chunks_are_sampled_as_the_exported_checkpoint_says(
    small: tuple[Models, Recipe, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A student's steps and guidance, not the preset's; a story's own and --steps come first."""
    models, recipe, folder = small
    source = Source(recipe, folder, None, None, sampling=SamplingConfig(2, 1.0))
    monkeypatch.setattr(check_cli, "source_from_name", lambda name: source)
    seen: list[tuple[int, float]] = []
    compared = check_cli.check_chunks

    def noted(ours: Generator, theirs: Generator, *given: object, **options: object) -> object:
        with theirs.session(["a green seven"], **options) as session:  # type: ignore[arg-type]
            seen.append((session.options.steps, session.options.guidance))
        return compared(ours, theirs, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(check_cli, "check_chunks", noted)
    monkeypatch.setattr(check_cli, "_other_backend", lambda source, models, backend: TorchBackend(recipe, models))
    monkeypatch.setattr(check_cli, "compare_networks", lambda *_, **__: iter([]))
    monkeypatch.setattr("longtake.runtime.check.report.draw", lambda *_: None)
    own, plain = tmp_path / "own.yaml", tmp_path / "plain.yaml"
    plain.write_text("shots:\n  - prompt: a green seven\n")
    own.write_text("steps: 1\nguidance: 2\nshots:\n  - prompt: a green seven\n")
    for story, steps in ((plain, None), (plain, 3), (own, None)):
        assert check_cli.run(_args(tmp_path / "check.json", story=story, steps=steps)) == 0
        report = json.loads((tmp_path / "check.json").read_text())
        assert (report["steps"], report["guidance"]) == seen[-1]
    assert seen == [(2, 1.0), (3, 1.0), (1, 2.0)]
    assert "sampled with 2 steps, guidance 1" in capsys.readouterr().out


def test_other_checkpoints_than_the_exported_ones_are_an_error(
    small: tuple[Models, Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, recipe, _ = small
    monkeypatch.setattr(check_cli, "load_models", lambda preset, checkpoints: models)
    with pytest.raises(LongtakeError, match=r"(?s)exported from other checkpoints.*--checkpoints FOLDER"):
        check_cli.models_of_export(recipe, SimpleNamespace(onnx_name=recipe.onnx_name, amax={}), None)  # type: ignore[arg-type]
    with pytest.raises(LongtakeError, match="the export is not of recipe"):
        check_cli.models_of_export(recipe, SimpleNamespace(onnx_name="other_bf16", amax=models.amax), None)  # type: ignore[arg-type]


def test_the_report_names_failing_chunks(small: tuple[Models, Recipe, Path], tmp_path: Path) -> None:
    models, recipe, _ = small
    rows = [Row("dit", "full window", "velocity", "ONNX Runtime", 0.0, 0.0, 0.03)]
    chunks = [ChunkRow(0, 0.99, 0.98, 0.01, 0.98), ChunkRow(1, 0.5, 0.4, 0.3, 0.98)]
    report = write_report(tmp_path / "r.json", recipe, TorchBackend(recipe, models), rows, chunks, "reference")
    assert report["passed"] is False and [row["passed"] for row in report["chunks"]] == [True, False]


def test_no_story_is_told_where_prompts_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    class Unreadable:
        @property
        def tokenizer(self) -> None:
            raise LongtakeError("the text encoder's tokenizer is missing")

    on_gpu, on_cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    readable = SimpleNamespace(text=SimpleNamespace(tokenizer=list), preset=PRESETS["tiny"])
    unreadable = SimpleNamespace(text=Unreadable(), preset=PRESETS["tiny"])
    assert check_cli.usual_story(readable, on_gpu) == check_cli.STORY  # type: ignore[arg-type]
    assert check_cli.usual_story(readable, on_cpu) is None and not capsys.readouterr().out  # type: ignore[arg-type]
    assert check_cli.usual_story(unreadable, on_gpu) is None  # type: ignore[arg-type]
    assert "tokenizer is missing" in capsys.readouterr().out
