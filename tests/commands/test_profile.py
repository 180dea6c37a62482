"""Profiles are in trtexec's format whoever measured them, and their tables add up."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from longtake.commands import profile as profile_cli
from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.runtime.profile.profile import (
    LayerTimes,
    profile_from_file,
    reference_profile,
    table,
    times_from_ort_events,
    timing_feed,
    trtexec_profile,
)
from longtake.training.models.presets import TINY
from longtake.training.models.wan.spec import dit_spec


def _times() -> LayerTimes:
    times = LayerTimes()
    for first, second in ((100.0, 9.0), (1.0, 3.0), (2.0, 3.0), (6.0, 3.0)):  # the first run is warm-up
        times.add("attention", first)
        times.add("ffn", second)
    return times


def test_format_is_trtexecs_export_profile() -> None:
    rows = _times().drop_first(1).as_json()
    assert rows[0] == {"count": 3}
    assert rows[1] == {"name": "attention", "timeMs": 9.0, "averageMs": 3.0, "medianMs": 2.0, "percentage": 50.0}
    assert sum(row["percentage"] for row in rows[1:]) == pytest.approx(100)


def test_table_is_sorted_and_adds_up() -> None:
    times = _times()
    times.add("norm", 0.5)
    lines = table(times.as_json(), top=2)
    assert lines[1].endswith("attention") and lines[2].endswith("ffn")
    assert "(1 more layers)" in lines[3] and "sum of 3 layers, mean of 4 runs" in lines[4]
    assert float(lines[4].split()[0]) == pytest.approx(109 / 4 + 18 / 4 + 0.5)


def test_time_inside_a_branch_is_counted_once() -> None:
    def node(name: str, op: str, start: int, duration: int) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": {"op_name": op}}

    events = [node("inner", "Mul", 12, 5), node("write", "If", 10, 20), node("after", "Add", 30, 1), {"cat": "Session"}]
    assert times_from_ort_events(events).by_layer == {"If: write": [0.02], "Add: after": [0.001]}


def _model(path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 8])
    nodes = [helper.make_node("MatMul", ["x", "x"], ["h"], name="product"),
             helper.make_node("Softmax", ["h"], ["y"], name="weights")]  # fmt: skip
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 20)])  # fmt: skip
    onnx.save(model, str(path))
    return path


def test_reference_profile_measures_every_node(tmp_path: Path) -> None:
    rows = reference_profile(_model(tmp_path / "m.onnx"), {"x": np.ones((8, 8), np.float32)}, 4, 1)
    assert rows[0] == {"count": 4}
    assert [row["name"] for row in rows[1:]] == ["MatMul: product", "Softmax: weights"]
    assert all(row["averageMs"] > 0 for row in rows[1:])


def test_a_broken_file_is_a_sentence(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LongtakeError, match="ONNX Runtime cannot run"):
        reference_profile(path, {}, 1, 1)
    path.write_text('[{"name": "x"}]')
    with pytest.raises(IntegrityError, match="is no profile"):
        profile_from_file(path)


def _trtexec(folder: Path, script: str) -> Path:
    path = folder / "trtexec"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_trtexec_is_called_and_its_profile_read(tmp_path: Path) -> None:
    """A stand-in that checks the options and writes what trtexec would: the real one was not at hand."""
    rows = json.dumps(_times().as_json())
    script = f"""case "$*" in *--loadEngine=*dit.plan*--separateProfileRun*) ;; *) exit 7;; esac
for a in "$@"; do case $a in --exportProfile=*) echo '{rows}' > "${{a#--exportProfile=}}";; esac; done"""
    assert trtexec_profile(_trtexec(tmp_path, script), tmp_path / "dit.plan", 5) == _times().as_json()


def test_a_failing_trtexec_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"(?s)could not profile dit.plan.*engine is broken.*--without-trtexec"):
        trtexec_profile(_trtexec(tmp_path, "echo engine is broken >&2; exit 1"), tmp_path / "dit.plan", 5)


def test_feeds_read_the_longest_window_and_write() -> None:
    spec = dit_spec(TINY, "nvfp4")
    feed = timing_feed(spec)
    assert feed["table"].tolist() == [0, 1, 2, -1] and feed["write_slot"].tolist() == [3]
    assert feed["values_0"].dtype == np.int8 and feed["latents"].shape == (1, 16, 8, 8, 8)
    assert list(feed) == [b.name for b in spec.inputs]


def test_command_refuses_zero_runs() -> None:
    with pytest.raises(LongtakeError, match="bad number of runs"):
        profile_cli.ProfileOptions(runs=0)


def test_command_writes_json_and_says_it_is_a_cpu_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from longtake.runtime import sources

    recipe = argparse.Namespace(name="tiny_bf16_sm89", model=TINY, cache="bf16", mode="fused")
    source = argparse.Namespace(recipe=recipe, onnx=tmp_path, engines=None)
    _model(tmp_path / "text_encoder.ort.onnx")
    monkeypatch.setattr(sources, "source_from_name", lambda name: source)
    monkeypatch.setattr(sources, "choose_backend", lambda *_: argparse.Namespace(backend="reference", reason="no GPU"))
    monkeypatch.setattr("longtake.formats.exported.Export.read", lambda folder: None)
    monkeypatch.setattr(profile_cli, "timing_feed", lambda spec: {"x": np.ones((8, 8), np.float32)})
    options = profile_cli.ProfileOptions(network=("text_encoder",), runs=2, top=5, out=tmp_path / "out")
    assert profile_cli.run(options) == 0
    text = capsys.readouterr().out
    assert "no GPU" in text and "a reference, no TensorRT figure" in text and "MatMul: product" in text
    assert profile_from_file(tmp_path / "out" / "tiny_bf16_sm89" / "text_encoder.json")[0] == {"count": 2}
