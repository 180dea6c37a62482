"""The `fp8` recipe from export to plans: parity, size, one plan for all middle layers, FP8 arithmetic in it."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from untrained import random_models

from longtake.accuracy.compare import compare_networks
from longtake.accuracy.rows import require_gate
from longtake.engines.build import segment_job
from longtake.engines.compile import PlanJob, engine_from_onnx
from longtake.engines.segment import CutNetwork, segments_from_onnx
from longtake.export.files import write_onnx
from longtake.export.functions import attach_functions
from longtake.export.lower import lower
from longtake.export.onnx_from_model import onnx_from_model
from longtake.export.rewriter import linear_name
from longtake.export.weights import stored_tensors
from longtake.formats.exported import Export
from longtake.formats.onnx_file import read_onnx, weights_from_onnx
from longtake.machine.flavour import flavour_for
from longtake.plugins.spec import DOMAIN
from longtake.training.models.presets import TINY
from longtake.training.models.wan.linears import quantized_linears
from longtake.training.models.wan.networks import DiTStep
from longtake.training.models.wan.spec import dit_spec


def test_every_network_agrees_with_pytorch(package) -> None:  # type: ignore[no-untyped-def]
    """Only flipped codes may exceed fp32's rounding, and only where activations are quantized."""
    models, recipe, folder = package("fp8")
    rows = list(compare_networks(models, recipe, folder))
    for row in rows:
        assert row.error < (2e-2 if row.network in ("dit", "context") else 1e-5), row
    require_gate(rows, "test")


def test_8_bit_weights_take_a_byte_on_disk(package) -> None:  # type: ignore[no-untyped-def]
    models, _, plain = package("bf16")
    _, _, packed = package("fp8")
    linears = Export.read(packed).networks["dit"].linears
    assert len(linears) == 2 * 8
    count = sum(models.dit.get_submodule(name).weight.numel() for name in linears)
    saved = (plain / "dit.onnx.data").stat().st_size - (packed / "dit.onnx.data").stat().st_size
    assert saved == pytest.approx(count, rel=0.03)  # less a scale a row


@pytest.fixture(scope="module")
def dit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of four layers with random weights, each activation of another amax."""
    path = tmp_path_factory.mktemp("fp8") / "dit.onnx"
    preset = replace(TINY, dit=replace(TINY.dit, layers=4), height=64, width=64)
    models = random_models(preset)
    amax = {name: {**entry, "input": 3.0 + 0.1 * i} for i, (name, entry) in enumerate(models.amax.items())}
    model = onnx_from_model(DiTStep(models.dit, "nvfp4").eval(), dit_spec(preset, "nvfp4"))
    here = set(quantized_linears(models.dit)) & {linear_name(node) for node in model.graph.node}
    lowered = lower(model, "fp8", here, amax)
    attach_functions(model)
    write_onnx(model, path, stored_tensors(model, models.dit.state_dict(), "fp8", lowered, amax))
    return path


@pytest.fixture(scope="module")
def cut(dit_file: Path) -> CutNetwork:
    return segments_from_onnx(read_onnx(dit_file, "small"), "dit")


def test_middle_layers_share_one_plan_though_their_scales_differ(cut: CutNetwork) -> None:
    runs = [step.name for step in cut.graph.steps if step.kind == "segment"]
    assert len(runs) == 5 and len(set(runs[1:4])) == 1
    middle = next(s for s in cut.graph.segments if s.name == runs[1])
    kinds = Counter(middle.types[name].dtype for name in middle.inputs if middle.types[name].shape != ())
    assert kinds["fp8"] == 8  # o, cross q and o, ffn, and the next layer's q, k, v
    scalars = [name for name in middle.inputs if middle.types[name].shape == ()]
    assert len(scalars) >= 5  # the multipliers of activations: one for q, k and v each here, as their amax differ


def test_the_weights_of_a_segmented_network_come_in_the_dtype_it_takes(cut: CutNetwork, dit_file: Path) -> None:
    names = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "int64": "int64"}
    for name, tensor in weights_from_onnx(dit_file, set(cut.graph.weights)):
        kind = cut.graph.tensors[name]
        assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{names[kind.dtype]}", kind.shape), name


def test_the_middle_segment_multiplies_in_fp8(cut: CutNetwork, caplog: pytest.LogCaptureFixture) -> None:
    name = [step.name for step in cut.graph.steps if step.kind == "segment"][1]
    job = segment_job(cut.graph.segment(name), cut.models[name])
    with caplog.at_level(logging.DEBUG, "longtake.tensorrt"):
        engine_from_onnx(job, "8.9", flavour_for(None), show_progress=False)
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    layers = [line for line in lines if line.startswith("Name:") and ", LayerType: " in line]
    products = [line.partition("Inputs:")[2].partition("Constants:")[0] for line in layers if "LayerType: gemm" in line]
    assert sum(line.count("Datatype: FP8") == 2 for line in products) == 8, products


@pytest.mark.slow
@pytest.mark.parametrize("target", ["8.9", "12.0"])
def test_a_fused_engine_builds_with_plugins_inside(dit_file: Path, target: str) -> None:
    model = onnx.load(dit_file, load_external_data=False)
    plugins = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)
    preset = replace(TINY, dit=replace(TINY.dit, layers=4), height=64, width=64)
    job = PlanJob("dit", dit_file, "", dit_spec(preset, "nvfp4").as_json(), plugins)
    plan, layers = engine_from_onnx(job, target, flavour_for(None), False)
    assert len(plan) > 100_000 and layers > plugins.total()
