"""A build that will not fit is refused with figures before it starts; a segment needs next to nothing."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from longtake.engines import precheck
from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.recipe import recipe_named
from longtake.paths import REPOSITORY

NVFP4 = recipe_named("wan2.2-ti2v-5b_nvfp4_sm120")


def graph(rows: int) -> onnx.ModelProto:
    """A Linear of rows x 1024 bf16 weights that lie outside of the file."""
    weight = TensorProto(
        name="w", data_type=TensorProto.BFLOAT16, dims=[rows, 1024], data_location=TensorProto.EXTERNAL
    )
    weight.external_data.add(key="location", value="dit.onnx.data")
    ends = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, s) for n, s in (("x", [8, 1024]), ("y", [8, rows]))]
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    return helper.make_model(helper.make_graph(nodes, "dit", ends[:1], ends[1:], [weight]))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    onnx.save(graph(1 << 21), tmp_path / "dit.onnx")  # 4.3 GB, were it there
    (tmp_path / "dit.onnx.data").write_bytes(b"")
    return tmp_path / "dit.onnx"


def test_too_little_memory_is_refused_with_figures(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precheck, "memory_free", lambda: int(8e9))
    with pytest.raises(UnavailableError) as caught:
        precheck.require_resources(NVFP4, [exported], exported.parent)
    said = str(caught.value)
    assert "got: 8.0 GB free" in said and "4.29 GB of weights" in said and "segmented recipe" in said
    needed = precheck.memory_needed("nvfp4", 2 * 1024 * (1 << 21)) / 1e9
    assert f"expected: {needed:.1f} GB" in said
    monkeypatch.setattr(precheck, "memory_free", lambda: int(needed * 1e9) + 1)
    precheck.require_resources(NVFP4, [exported], exported.parent)


def test_too_little_disk_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, needed: int) -> None:
        raise LongtakeError("not enough disk space", got=needed)

    monkeypatch.setattr(precheck, "require_disk", full)
    with pytest.raises(LongtakeError, match="not enough disk space") as caught:
        precheck.require_resources(NVFP4, [exported], exported.parent)
    assert 4.3e9 < float(caught.value.got) < 5.5e9  # type: ignore[arg-type]


def test_a_plan_with_weights_is_not_built_from_a_skeleton(exported: Path) -> None:
    exported.with_name("dit.onnx.data").unlink()
    with pytest.raises(LongtakeError, match=r"has no weights[\s\S]*fix: export from checkpoints"):
        precheck.require_resources(NVFP4, [exported], exported.parent)


def test_segments_take_their_weights_as_inputs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precheck, "memory_free", lambda: int(2e9))
    precheck.require_resources(NVFP4, [graph(1 << 21)], exported.parent)


def test_this_machine_says_what_is_free() -> None:
    free = precheck.memory_free()
    assert free is not None and 1e8 < free < 1e14


def test_the_promise_covers_the_measured_build() -> None:
    measured = json.loads((REPOSITORY / "docs/measurements/build_5b_nvfp4_sm120.json").read_text())
    for plan in (plan for plan in measured["plans"] if "peak_rss_gb" in plan):
        promised = precheck.memory_needed("nvfp4", int(plan["weights_gb"] * 1e9)) / 1e9
        assert plan["peak_rss_gb"] <= promised < 24e9 / 1e9, plan
