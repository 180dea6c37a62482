"""`longtake inspect` says what a file is, and a broken, swapped or foreign file gets a sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from longtake.commands import inspect as inspect_cli
from longtake.commands.describe import describe
from longtake.errors import IntegrityError, LongtakeError
from longtake.files import sha256, write_json
from longtake.formats.exported import Export, ExportedFile, ExportedNetwork
from longtake.formats.plan import PlanManifest
from longtake.training.models.wan.slots import SlotTable


def _fp4_linear(folder: Path, external: bool = False) -> Path:
    """One 4-bit linear [K=32, N=8]: FP4 values, FP8 block scales, an fp32 scale; an op of our domain behind it."""
    initializers = [
        helper.make_tensor("w", TensorProto.FLOAT4E2M1, [8, 32], bytes(8 * 32 // 2), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT8E4M3FN, [8, 2], bytes(8 * 2), raw=True),
        helper.make_tensor("g", TensorProto.FLOAT, [], np.ones((), np.float32).tobytes(), raw=True),
        helper.make_tensor("packed", TensorProto.INT8, [8, 16], bytes(8 * 16), raw=True),
        helper.make_tensor("packed_scales", TensorProto.INT8, [8, 2], bytes(16), raw=True),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["s", "g"], ["s32"]),
        helper.make_node("DequantizeLinear", ["w", "s32"], ["w32"], axis=1, block_size=16),
        helper.make_node("nvfp4_dequantize", ["packed", "packed_scales"], ["w2"], domain="longtake"),
        helper.make_node("Gemm", ["x", "w32"], ["y"], transB=1),
        helper.make_node("Gemm", ["x", "w2"], ["z"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 32])
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", 8]) for name in ("y", "z")]
    graph = helper.make_graph(nodes, "linear", [x], outs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("longtake", 1)])
    path = folder / "linear.onnx"
    onnx.save(model, str(path), save_as_external_data=external, location="linear.onnx.data", size_threshold=0)
    return path


def test_onnx_ops_bindings_and_bits(tmp_path: Path) -> None:
    found = describe(_fp4_linear(tmp_path))
    assert found["kind"] == "ONNX model"
    assert found["ops"] == {"DequantizeLinear": 2, "Gemm": 2, "longtake::nvfp4_dequantize": 1}
    assert found["custom_ops"] == {"longtake::nvfp4_dequantize": {"nodes": 1, "function_body": False}}
    assert found["inputs"] == [{"name": "x", "type": "FLOAT", "shape": ["T", 32]}]
    assert found["weights"]["FLOAT4E2M1"] == {"tensors": 1, "elements": 256, "bytes": 128}
    assert found["quantized_weights"] == {"count": 2, "elements": 512, "bytes": 288, "bits_per_weight": 4.5}


def test_onnx_external_data_is_measured_and_missed(tmp_path: Path) -> None:
    path = _fp4_linear(tmp_path, external=True)
    data = tmp_path / "linear.onnx.data"
    assert describe(path)["external_data"] == {"linear.onnx.data": data.stat().st_size}
    data.write_bytes(data.read_bytes()[:-40])
    with pytest.raises(IntegrityError, match="weights of linear.onnx are missing or truncated"):
        describe(path)
    data.unlink()
    with pytest.raises(IntegrityError, match=r"linear.onnx.data does not exist"):
        describe(path)


@pytest.mark.parametrize("keep", [1, 40, 300])
def test_truncated_onnx(tmp_path: Path, keep: int) -> None:
    path = _fp4_linear(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match="is not a readable ONNX model"):
        describe(path)


def _checkpoint(folder: Path) -> Path:
    path = folder / "dit.safetensors"
    save_file({"a.weight": np.zeros((4, 8), np.float32), "b": np.zeros(3, np.float16)}, path, metadata={"step": "7"})
    write_json(folder / "dit.json", {"sha256": sha256(path), "preset": "tiny", "step": 7})
    return path


def test_checkpoint_counts_and_digest(tmp_path: Path) -> None:
    found = describe(_checkpoint(tmp_path))
    assert (found["tensors"], found["elements"], found["digest"]) == (2, 35, "matches")
    assert found["weights"]["F16"] == {"tensors": 1, "elements": 3, "bytes": 6}
    assert found["description"]["step"] == 7


def test_swapped_and_truncated_checkpoints(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(IntegrityError, match="is not the file that dit.json describes"):
        describe(path)
    for keep in (4, 30, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(IntegrityError, match="is not a whole safetensors file"):
            describe(path)


def test_pickles_are_refused_whatever_their_name(tmp_path: Path) -> None:
    plain, zipped = tmp_path / "dit.safetensors", tmp_path / "dit.onnx"
    plain.write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.zeros(2)}, zipped)
    for path in (plain, zipped):
        with pytest.raises(
            IntegrityError, match="(?s)is a pickle.*convert it where you trust it: safetensors"
        ) as caught:
            describe(path)
        assert caught.value.exit_code == 4


def _plan(folder: Path, name: str, content: bytes) -> Path:
    path = folder / f"{name}.plan"
    path.write_bytes(content)
    manifest = PlanManifest(path.name, name, sha256(path), len(content), "", "tensorrt_rtx", "1.7.1", "12.0", {}, {},
                            "tiny_nvfp4_sm120", "tiny")  # fmt: skip
    manifest.write(path)
    return path


def test_plan_is_described_by_its_manifest(tmp_path: Path) -> None:
    path = _plan(tmp_path, "dit", b"plan bytes")
    found = describe(path)
    assert found["digest"] == "matches the manifest" and found["manifest"]["flavour"] == "tensorrt_rtx"
    assert describe(tmp_path / "dit.plan.json")["kind"] == "plan manifest"
    (tmp_path / "dit.plan.json").unlink()
    assert "not opened to look inside" in describe(path)["manifest"]


def test_swapped_plan(tmp_path: Path) -> None:
    first, second = _plan(tmp_path, "dit", b"one"), _plan(tmp_path, "vae", b"two")
    second.replace(first)
    with pytest.raises(IntegrityError, match="dit.plan is not the plan that dit.plan.json describes"):
        describe(first)


def test_swapped_onnx_is_caught_by_the_export_description(tmp_path: Path) -> None:
    path = _fp4_linear(tmp_path)
    files = {path.name: ExportedFile(sha256(path), path.stat().st_size)}
    Export("tiny_nvfp4", "tiny", "nvfp4", "nvfp4", {"linear": ExportedNetwork(files)}, ()).write(tmp_path)
    assert describe(path)["digest"] == "matches export.json"
    assert describe(tmp_path)["kind"] == "export description"
    model = onnx.load(str(path))
    model.graph.name = "other"
    onnx.save(model, str(path))
    with pytest.raises(IntegrityError, match="is not the file that was exported under its name"):
        describe(path)


def test_saved_session(tmp_path: Path) -> None:
    from longtake.runtime.snapshot import Identity, Snapshot, snapshot_to_file
    from longtake.runtime.state import Position

    identity = Identity("tiny", "tiny_w4a16", "nvfp4", 5, 16, 3.0, "", 5.0)
    path = tmp_path / "session.safetensors"
    snapshot_to_file(Snapshot(identity, Position((), SlotTable(4)), {"positive.0.0": torch.zeros(2, 3)}), path)
    found = describe(path)
    assert (found["kind"], found["identity"]["seed"], found["position"]["chunk"]) == ("saved session", 5, 0)
    assert found["tensors"] == {"positive.0.0": [2, 3]}
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(IntegrityError, match="was altered after it was saved"):
        describe(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.onnx", b"", "is empty"),
        ("notes.txt", b"hello", "not a kind of file that longtake knows"),
        ("odd.json", b'{"colour": "red"}', "JSON of no known kind"),
        ("cut.json", b'{"recipe": "ti', "is not valid JSON"),
        ("latin.json", b'{"recipe": "\xe9"}', "is not UTF-8 text"),
        ("list.json", b"[1]", "holds no description"),
    ],
)
def test_other_files_get_a_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        describe(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="does not exist"):
        describe(tmp_path / "nothing.plan")


def test_numbered_bindings_are_one_line() -> None:
    items = [{"name": f"values_{i}", "type": "INT8", "shape": [4, 2]} for i in range(6)]
    assert inspect_cli.grouped(items) == [{"name": "values_N x 6", "type": "INT8", "shape": [4, 2]}]
    assert list(inspect_cli.lines({"a": list(range(99))}))[-1].strip() == "... 77 more (--json shows all)"


def test_command_prints_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [_fp4_linear(tmp_path), _checkpoint(tmp_path)]
    assert inspect_cli.run(inspect_cli.InspectOptions(files=tuple(files))) == 0
    text = capsys.readouterr().out
    assert "bits_per_weight 4.5" in text and "dit.safetensors" in text
    assert inspect_cli.run(inspect_cli.InspectOptions(files=tuple(files), json=True)) == 0
    assert [item["kind"] for item in json.loads(capsys.readouterr().out)] == ["ONNX model", "checkpoint (safetensors)"]
