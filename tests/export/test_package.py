"""What `longtake export` writes: parity with PyTorch, sizes, types; and what interrupts, damage or repeats do to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from held_weights import weights_from_models

from longtake import chain
from longtake.accuracy.cases import dit_feeds, empty_caches
from longtake.accuracy.compare import compare_networks
from longtake.accuracy.rows import Row, require_gate
from longtake.commands import main as command
from longtake.errors import GateError, IntegrityError, LongtakeError
from longtake.export import package as package_module
from longtake.export.files import write_onnx
from longtake.export.onnx_from_model import onnx_from_model
from longtake.export.package import PlainGraphs, export_package, linears_of, view_path
from longtake.export.weights import stored_tensors
from longtake.formats.exported import Export
from longtake.formats.onnx_file import read_onnx
from longtake.training.models.families import family_of
from longtake.training.models.load import Models, meta_models
from longtake.training.models.presets import PRESETS
from longtake.training.models.side_file import SideFile
from longtake.training.models.wan.networks import ContextStep
from longtake.training.models.wan.spec import context_spec, dit_spec


@pytest.mark.parametrize("precision", ["bf16", "w4a16", "nvfp4"])
def test_every_network_agrees_with_pytorch(package, precision: str) -> None:  # type: ignore[no-untyped-def]
    """All window lengths, a commit, and both VAE steps. Only flipped 4-bit codes may exceed fp32 rounding."""
    models, recipe, folder = package(precision)
    rows = list(compare_networks(models, recipe, folder))
    assert {row.network for row in rows} == set(family_of(models.preset).networks(models.preset))
    assert {"first chunk", "one chunk read", "two chunks read", "full window"} <= {row.case for row in rows}
    flips = precision == "nvfp4" or recipe.cache == "nvfp4"
    for row in rows:
        assert row.error < (2e-2 if flips and row.network in ("dit", "context") else 1e-5), row
    require_gate(rows, "test")


def test_a_row_over_its_gate_fails_with_its_place() -> None:
    with pytest.raises(GateError, match="dit, full window, velocity: relative error 5.00e-02"):
        require_gate([Row("dit", "full window", "velocity", "ONNX Runtime", 0.05, 1.0, 0.03)], "tiny_bf16")


def test_4_bit_weights_take_4_5_bits_on_disk(package) -> None:  # type: ignore[no-untyped-def]
    """The DiT's file is as large as its unquantized part in bf16 plus 4.5 bits for every quantized weight."""
    models, _, plain = package("bf16")
    _, _, packed = package("nvfp4")
    export = Export.read(packed)
    count = sum(models.dit.get_submodule(n).weight.numel() for n in export.networks["dit"].linears)
    saved = (plain / "dit.onnx.data").stat().st_size - (packed / "dit.onnx.data").stat().st_size
    assert saved == pytest.approx(count * (16 - 4.5) / 8, rel=0.002)
    types = {t.name: t.data_type for t in onnx.load(packed / "dit.onnx", load_external_data=False).graph.initializer}
    assert types["blocks.0.ffn.0.weight.values"] == onnx.TensorProto.FLOAT4E2M1
    assert types["blocks.0.ffn.0.weight.scales"] == onnx.TensorProto.FLOAT8E4M3FN


def test_a_pass_that_writes_nothing_returns_the_cache_unchanged(package) -> None:  # type: ignore[no-untyped-def]
    models, _, folder = package("w4a16")
    spec = dit_spec(models.preset, "nvfp4")
    generator = torch.Generator().manual_seed(0)
    caches = {
        name: torch.randint(0, 100, value.shape, generator=generator).to(value.dtype)
        for name, value in empty_caches(spec).items()
    }
    context = {b.name: torch.zeros(b.shape) for b in spec.inputs if b.name.startswith("context")}
    feeds = dit_feeds(models.preset, context, caches, [1, -1], 1, -1, 500.0, generator)
    session = onnxruntime.InferenceSession(str(folder / "dit.ort.onnx"))
    outputs = session.run(None, {name: value.numpy() for name, value in feeds.items()})[1:]
    assert all(np.array_equal(got, old.numpy()) for got, old in zip(outputs, caches.values()))


def test_the_same_model_exports_to_the_same_bytes(small_models: Models, tmp_path: Path) -> None:
    spec = context_spec(small_models.preset)
    for name in ("a", "b"):
        model = onnx_from_model(ContextStep(small_models.dit).eval(), spec)
        content = stored_tensors(model, small_models.dit.state_dict(), "bf16", [], {})
        write_onnx(model, tmp_path / f"{name}.onnx", content)
    graphs = [(tmp_path / f"{name}.onnx").read_bytes().replace(f"{name}.onnx.data".encode(), b"") for name in "ab"]
    assert graphs[0] == graphs[1]
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()


def test_plain_polygraphy_opens_the_view(package) -> None:  # type: ignore[no-untyped-def]
    """No custom domain, no function, no bf16 and no FP4 is left in it."""
    models, _, folder = package("nvfp4")
    for name in family_of(models.preset).networks(models.preset):
        view = read_onnx(view_path(folder / f"{name}.onnx"))
        assert {entry.domain for entry in view.opset_import} == {""} and not view.functions
        types = {t.data_type for t in view.graph.initializer}
        assert not types & {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT4E2M1}


def test_an_interrupt_leaves_no_package_and_no_partial_file(
    small_graphs: PlainGraphs, small_models: Models, package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    recipe = package("bf16")[1]
    calls = []

    def interrupted(path: Path, expected: object, skeleton: bool) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt

    (tmp_path / "export.json").write_text("{}")
    monkeypatch.setattr(package_module, "check_structure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_package(small_graphs, recipe, tmp_path, "inputs", lambda words: None, weights_from_models(small_models))
    assert not (tmp_path / "export.json").exists()
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]
    with pytest.raises(LongtakeError, match="holds no exported model"):
        Export.read(tmp_path)


def test_a_full_disk_is_noticed_before_anything_is_written(
    small_graphs: PlainGraphs, small_models: Models, package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    recipe = package("bf16")[1]
    monkeypatch.setattr(package_module, "disk_needed", lambda graphs, recipe: 10**15)
    with pytest.raises(LongtakeError, match=r"not enough disk space[\s\S]*expected: at least 1000000.00 GB"):
        export_package(
            small_graphs, recipe, tmp_path / "out", "inputs", lambda words: None, weights_from_models(small_models)
        )
    assert not (tmp_path / "out").exists()


def test_a_changed_file_is_noticed(package, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = package("bf16")[2]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Export.read(tmp_path)
    data = bytearray((tmp_path / "dit.onnx.data").read_bytes())
    data[1000] ^= 1
    (tmp_path / "dit.onnx.data").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"dit.onnx.data is not what was exported[\s\S]*longtake export --force"):
        Export.read(tmp_path)


def test_export_command(
    small_graphs: PlainGraphs,
    small_models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once: parity table and export.json. Again: nothing to do. New checkpoint: exported anew."""
    made = []

    def export(*arguments: object) -> object:
        made.append(arguments)
        return export_package(*arguments)

    monkeypatch.setattr(chain, "load_models", lambda preset, folder: small_models)
    monkeypatch.setattr(chain, "PlainGraphs", lambda preset, vocabulary: small_graphs)
    monkeypatch.setattr(chain, "weights_from_folder", lambda preset, folder: weights_from_models(small_models))
    monkeypatch.setattr(chain, "export_package", export)
    side = SideFile("dit", "tiny", sampling={"steps": 4, "guidance": 1.0})
    monkeypatch.setattr(chain, "read_side", lambda *given: side)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "dit.safetensors").write_bytes(b"one")
    replace(side, sha256="1" * 64).write(checkpoints / "dit.json")
    arguments = ["export", "--recipe", "tiny_bf16_sm89", "--recipe", "tiny_bf16_sm90"]
    arguments += ["--checkpoints", str(checkpoints), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "parity, PyTorch <-> ONNX Runtime" in said and "MB ONNX" in said and "FAIL" not in said
    index = json.loads((tmp_path / "out" / "tiny_bf16" / "export.json").read_text())
    assert index["parity"] and all(row["passed"] for row in index["parity"])
    assert index["networks"]["dit"]["spec"]["name"] == "dit"
    assert index["sampling"] == {"steps": 4, "guidance": 1.0}
    assert command.main(arguments) == 0 and len(made) == 1
    assert "up to date" in capsys.readouterr().out
    (checkpoints / "dit.safetensors").write_bytes(b"two")
    assert command.main([*arguments, "--no-parity"]) == 0 and len(made) == 2


def test_missing_checkpoints_are_one_clear_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--recipe", "tiny_bf16_sm89", "--checkpoints", str(tmp_path), "--out", str(tmp_path / "o")]
    assert command.main(arguments) != 0
    said = capsys.readouterr().err
    assert str(tmp_path) in said and "fix:" in said and "Traceback" not in said
    assert not (tmp_path / "o").exists()


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["export", "--recipe", "tiny_bf16_sm98"]) != 0
    assert "did you mean" in capsys.readouterr().err


def test_a_linear_that_is_no_gemm_is_not_left_as_it_is() -> None:
    """A family whose module multiplies in three dimensions would be exported unquantized under a recipe's name."""
    models = meta_models(PRESETS["world-tiny"])
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "dit", [], []))
    with pytest.raises(LongtakeError, match=r"(?s)does not show every linear.*no Gemm of.*expected: 56 Gemms"):
        linears_of(models, empty, "dit")
    assert linears_of(models, empty, "vae_first") == {}
