"""The VAE decoder with convolutions in 8-bit codes: which, with what scales, what its frames cost, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from untrained import random_models

from longtake.commands.main import main
from longtake.engines.segment import segments_from_onnx
from longtake.errors import IntegrityError, LongtakeError
from longtake.export.functions import register_schemas
from longtake.export.lower_conv8 import ConvCodes, lower_convs
from longtake.export.package import conv_codes
from longtake.export.rewriter import reference
from longtake.export.weights import weights_from_folder
from longtake.formats.recipe import Recipe, recipe_named
from longtake.formats.segmented_graph import SegmentedGraph
from longtake.paths import REPOSITORY
from longtake.plugins.codes import CODES, decode, factor_of
from longtake.plugins.registry import op_named
from longtake.plugins.spec import DOMAIN, PLUGIN_ATTRIBUTES
from longtake.runtime.backends.segments.planner import planned_steps
from longtake.runtime.backends.segments.vae_first import first_steps
from longtake.runtime.budget.recorded_steps import library_decoder_steps
from longtake.training.models.conv_calibration import ConvCalibration, ConvInput
from longtake.training.models.load import Models, load_models
from longtake.training.models.presets import TINY
from longtake.training.models.side_file import SideFile
from longtake.training.models.wan.networks import network_module
from longtake.training.models.wan.spec import network_spec
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.vae_codes import (
    CodedConv,
    Watched,
    chosen_codes,
    codable,
    codable_names,
    coded_caches,
)
from longtake.training.models.wan.vae_library import coded_ops, library_ops

SHIPPED = REPOSITORY / "training" / "checkpoints" / "tiny"
RECIPE = REPOSITORY / "docs" / "recipes_library" / "tiny_fp8_conv8_sm90.yaml"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipe_named(str(RECIPE))


@pytest.fixture(scope="module")
def shipped() -> ConvCalibration:
    found = SideFile.read(SHIPPED / "vae.json").convs
    assert found is not None
    return found


def test_all_but_the_ends_and_the_shortcuts_are_coded() -> None:
    names = codable_names(TINY.vae)
    assert len(names) == 25 and not any(name.startswith(("decoder.conv_", "encoder")) for name in names)
    assert not any("shortcut" in name or "attention" in name for name in names)
    caches = coded_caches(TINY.vae)
    assert caches[0] == caches[-1] == "" and all(caches[1:-1]) and len(set(caches)) == len(caches) - 1


def test_a_convolution_that_the_kernel_does_not_take_stays_in_bf16(caplog: pytest.LogCaptureFixture) -> None:
    odd = replace(TINY.vae, decoder_dim=20)
    with torch.device("meta"):
        names = codable(CausalVAE(odd))
    assert names and all(layer.in_channels % 16 == 0 for layer in names.values())
    assert "stays in bf16: the kernel takes a multiple of 16 channels to a multiple of 8, not 20 to 20" in caplog.text
    dtypes = [b.dtype for b in network_spec(replace(TINY, vae=odd), recipe_named(str(RECIPE)), "vae_steady").inputs[1:]]
    assert {"int8", "bf16"} == set(dtypes)


def test_the_peak_decides_between_the_codes(shipped: ConvCalibration) -> None:
    assert ConvInput(10.9, 1.0).codes == "int8" and ConvInput(11.1, 1.0).codes == "fp8"
    chosen = chosen_codes(TINY.vae, "calibrated", shipped)
    assert Counter(chosen.values()) == {"int8": 17, "fp8": 8}
    assert set(chosen_codes(TINY.vae, "fp8", shipped).values()) == {"fp8"} and not chosen_codes(
        TINY.vae, "bf16", shipped
    )
    plain, coded = library_ops(CausalVAE(TINY.vae)), coded_ops(CausalVAE(TINY.vae), chosen)
    assert sum(plain.values()) == sum(coded.values())
    assert sum(n for name, n in coded.items() if op_named(name).kernel_size and op_named(name).codes) == 25


def test_scales_undo_the_codes() -> None:
    weight = torch.randn(8, 16, 3, 3, 3)
    for codes in CODES:
        conv = CodedConv(weight, codes, peak=3.0).bfloat16()
        assert conv.scale.dtype == conv.factor.dtype == torch.float32, "a cast of the module leaves scales exact"
        worth = conv.scale.view(-1, 1, 1, 1, 1) * factor_of(3.0, codes)
        assert (decode(conv.weight, codes) * worth - weight).norm() < 0.03 * weight.norm()


def test_what_is_watched_is_what_is_read() -> None:
    torch.manual_seed(0)
    vae = CausalVAE(replace(TINY.vae, dim_mult=(1,), temporal_down=(), stride=(1, 2, 2), res_blocks=1)).eval()
    latents = torch.randn(1, 3, 16, 4, 4)
    with torch.no_grad(), Watched(vae) as seen:
        vae.decode(latents)
        vae.decode(2 * latents)
    found = seen.calibration("digest")
    assert found.weights == "digest" and all(0 < i.rms < i.peak for i in found.inputs.values())
    with pytest.raises(IntegrityError, match=r"no usable scale for decoder[\s\S]*peak 0.0, rms 0.0"):
        Watched(vae).calibration()


@pytest.mark.parametrize(
    "change, message",
    (
        ({"weights": "0" * 64}, r"the calibration of the VAE's convolutions is of another VAE[\s\S]*convert --calibrate"),
        ({"inputs": {}}, r"the VAE's convolutions are not calibrated\n  got: nothing of decoder.stages.0.before.conv1.conv and 24 more"),
        ({"peak": 0.0}, r"no usable scale for decoder.stages.0.before.conv1.conv\n  got: peak 0.0"),
        ({"peak": 1e999}, r"vae.json is not a checkpoint's side file\n  got: convs: "),  # which no JSON of ours holds
    ),
)  # fmt: skip
def test_a_calibration_that_does_not_fit_is_refused(
    shipped: ConvCalibration, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for path in SHIPPED.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    told = json.loads((tmp_path / "vae.json").read_text())
    if "peak" in change:
        told["convs"]["inputs"]["decoder.stages.0.before.conv1.conv"] |= change
    else:
        told["convs"] |= change
    (tmp_path / "vae.json").write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match=message):
        weights_from_folder(TINY, tmp_path)
    with pytest.raises(IntegrityError, match=message):
        load_models(TINY, tmp_path)


def test_a_scale_of_infinity_is_refused(shipped: ConvCalibration) -> None:
    name = codable_names(TINY.vae)[3]
    for bad in (float("inf"), float("nan"), -1.0):
        broken = replace(shipped, inputs={**shipped.inputs, name: ConvInput(bad, 1.0)})
        with pytest.raises(IntegrityError, match=rf"no usable scale for {name}\n  got: peak {bad}"):
            broken.require(codable_names(TINY.vae), shipped.weights)


def test_a_recipe_without_its_calibration_is_refused(recipe: Recipe) -> None:
    models = random_models(TINY)
    with pytest.raises(LongtakeError, match=r"vae_conv: calibrated needs calibrated convolutions[\s\S]*--calibrate"):
        network_module(models, recipe, "vae_steady")
    weights = replace(weights_from_folder(TINY, SHIPPED), convs=None)
    with pytest.raises(IntegrityError, match="the VAE's convolutions are not calibrated"):
        conv_codes(TINY, recipe, weights)
    assert set(conv_codes(TINY, recipe, None).chosen.values()) == {"fp8"}, "a skeleton needs none"


@torch.no_grad()
def test_the_networks_hand_codes_on(recipe: Recipe, shipped: ConvCalibration) -> None:
    models: Models = load_models(TINY, SHIPPED)
    first, steady = (network_module(models, recipe, name) for name in ("vae_first", "vae_steady"))
    specs = [network_spec(TINY, recipe, name) for name in ("vae_first", "vae_steady")]
    frames, *caches = first(torch.randn(1, 16, 1, 8, 8))
    longer, *after = steady(torch.randn(1, 16, 1, 8, 8), *caches)
    assert frames.shape[2] == 1 and longer.shape[2] == 4
    for spec, made in zip(specs, (caches, after)):
        kinds = {"int8": torch.int8, "bf16": torch.float32}  # the checkpoint in fp32, as a test runs it
        assert [kinds[b.dtype] for b in spec.outputs[1:]] == [t.dtype for t in made]
    assert sum(t.dtype == torch.int8 for t in after) == 22
    assert {t.dtype for t in network_module(models, replace(recipe, vae_conv="bf16"), "vae_first")(longer.new_zeros(1, 16, 1, 8, 8))} == {
        torch.float32
    }  # fmt: skip


def test_codes_take_half_of_the_memory() -> None:
    plain, coded = (library_decoder_steps(TINY, how) for how in ("bf16", "fp8"))
    with torch.device("meta"):
        vae = CausalVAE(TINY.vae)
    ops = Counter(step.name for step in coded.steps if step.kind == "op")
    assert ops == coded_ops(vae, chosen_codes(TINY.vae, "fp8", None))
    scratch = {segment.name: 0 for segment in coded.segments}
    assert planned_steps(coded, scratch).layout(scratch)[2] < planned_steps(plain, scratch).layout(scratch)[2]
    first = first_steps(coded)
    assert first is not None and Counter(step.name for step in first.plan.graph.steps)["encode_fp8"] == 3
    assert not any("3x1x1" in step.name or "encode_time" in step.name for step in first.plan.graph.steps)
    largest = max(t.shape[1] * t.shape[2] for t in coded.tensors.values() if t.dtype == "int8" and len(t.shape) == 4)
    assert largest == TINY.latent_hw[0] * TINY.latent_hw[1] * 4**3, (
        "the last level's rows; no codes of a frame beyond them"
    )
    up = next(name for name in coded.weights if name.endswith("resample/space.weight"))
    assert coded.tensors[up].shape[2:] == (1, 2, 2) and coded.tensors[up].shape[0] == 4 * coded.tensors[up].shape[1]


def graph_of(
    nodes: list[onnx.NodeProto],
    shapes: dict[str, tuple[int, ...]],
    weights: dict[str, tuple[int, ...]],
    ends: tuple[list[str], list[str]],
    between: str,
) -> onnx.ModelProto:
    """A steady decoder as the exporter leaves it, in bf16. ends: names of what goes in and comes out; between: of what is told."""
    values = {n: helper.make_tensor_value_info(n, TensorProto.BFLOAT16, s) for n, s in shapes.items()}
    initializers = [reference(n, TensorProto.BFLOAT16, list(s)) for n, s in weights.items()]
    inputs, outputs = ([values[n] for n in names] for names in ends)
    graph = helper.make_graph(nodes, "vae_steady", inputs, outputs, initializers, value_info=[values[between]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)])


def small_graph(readers: int = 1) -> onnx.ModelProto:
    """norm_silu_extend and a convolution with residual; `readers` of what the norm makes."""
    register_schemas()
    frame, past, longer = (1, 4, 4, 16), (2, 4, 4, 16), (3, 4, 4, 16)
    shapes = {"x": frame, "vae_cache_0": past, "y": longer, "vae_cache_0_out": past, "out": frame}
    attributes = {"domain": DOMAIN, **PLUGIN_ATTRIBUTES}
    nodes = [
        helper.make_node("norm_silu_extend", ["x", "g.gamma", "vae_cache_0"], ["y", "vae_cache_0_out"], **attributes),
        helper.make_node("conv_3x3x3_add", ["y", "a.conv.weight", "a.conv.bias", "x"], ["out"], **attributes),
        *(helper.make_node("Identity", ["y"], [f"copy{i}"]) for i in range(readers - 1)),
    ]
    weights = {"g.gamma": (16,), "a.conv.weight": (16, 16, 3, 3, 3), "a.conv.bias": (16,)}
    return graph_of(nodes, shapes, weights, (["x", "vae_cache_0"], ["out", "vae_cache_0_out"]), "y")


def small_codes(codes: str) -> ConvCodes:
    return ConvCodes({"a.conv": codes}, ConvCalibration("", {"a.conv": ConvInput(4.0, 0.5)}), ("a.conv",))


def up_graph(behind: str = "upsample_time") -> onnx.ModelProto:
    """Upsampling and the convolution behind it, the frames' sizes told; or `behind` something else."""
    register_schemas()
    small, large = (2, 4, 6, 32), (2, 8, 12, 16)
    shapes = {"y": (1, 4, 6, 32), "wide": large, "out": (2, 8, 12, 24), "vae_cache_0": small, "h": small}
    attributes = {"domain": DOMAIN, **PLUGIN_ATTRIBUTES}
    given, made = (["y"], ["wide"]) if behind == "upsample_time" else (["y", "vae_cache_0"], ["wide", "h"])
    nodes = [
        helper.make_node(behind, given, made, **attributes),
        helper.make_node("conv_1x3x3", ["wide", "a.conv.weight", "a.conv.bias"], ["out"], **attributes),
    ]
    weights = {"a.conv.weight": (24, 16, 1, 3, 3), "a.conv.bias": (24,)}
    return graph_of(nodes, shapes, weights, (given, ["out", *made[1:]]), "wide")


@pytest.mark.parametrize("codes", CODES)
def test_lowering_folds_an_upsampling_into_the_convolution_behind_it(codes: str) -> None:
    model, lowered = (
        up_graph(),
        ConvCodes({"a.conv": codes}, ConvCalibration("", {"a.conv": ConvInput(4.0, 0.5)}), ("",)),
    )
    assert lower_convs(model, lowered, first=False) == ["a.conv"]
    encode, conv = model.graph.node
    assert encode.op_type == f"encode_time_{codes}" and list(encode.input) == ["y", "a_conv_factor"]
    assert conv.op_type == f"conv_1x3x3_up_{codes}" and list(conv.input)[0] == "wide" == encode.output[0]
    (wide,) = model.graph.value_info
    assert [d.dim_value for d in wide.type.tensor_type.shape.dim] == [2, 4, 6, 16]
    assert wide.type.tensor_type.elem_type == TensorProto.INT8
    tensors, weight = {t.name: t for t in model.graph.initializer}, torch.randn(24, 16, 1, 3, 3)
    content = lowered.content("a.conv", weight)
    assert {n: tuple(t.shape) for n, t in content.items()} == {n: tuple(tensors[n].dims) for n in content}
    onnx.shape_inference.infer_shapes(model, strict_mode=True)

    y = torch.randn(1, 4, 6, 32)
    coded = op_named(encode.op_type).reference(y, torch.tensor([factor_of(4.0, codes)]))
    got = op_named(conv.op_type).reference(coded, *content.values(), torch.zeros(24))
    wanted = op_named("conv_1x3x3").reference(op_named("upsample_time").reference(y), weight, torch.zeros(24))
    assert (got - wanted).norm() < {"fp8": 0.05, "int8": 0.015}[codes] * wanted.norm()


@pytest.mark.parametrize("codes", CODES)
def test_lowering_changes_a_convolution_and_what_is_in_front(codes: str) -> None:
    model = small_graph()
    assert lower_convs(model, small_codes(codes), first=False) == ["a.conv"]
    norm, conv = model.graph.node
    assert norm.op_type == f"norm_silu_extend_{codes}" and list(norm.input) == [
        "x",
        "g.gamma",
        "a_conv_factor",
        "vae_cache_0",
    ]
    assert conv.op_type == f"conv_3x3x3_add_{codes}"
    assert list(conv.input) == ["y", "a.conv.weight.codes", "a.conv.weight.scale", "a.conv.bias", "x"]
    tensors = {t.name: t for t in model.graph.initializer}
    assert "a.conv.weight" not in tensors and tensors["a.conv.weight.codes"].data_type == TensorProto.INT8
    factor = onnx.numpy_helper.to_array(tensors["a_conv_factor"])
    assert factor.tolist() == [factor_of(4.0, codes)]
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)
    }
    assert {n for n, kind in kinds.items() if kind == TensorProto.INT8} == {"vae_cache_0", "vae_cache_0_out", "y"}
    content = small_codes(codes).content("a.conv", torch.randn(16, 16, 3, 3, 3))
    assert {n: tuple(t.shape) for n, t in content.items()} == {n: tuple(tensors[n].dims) for n in content}


def test_lowering_a_first_step_encodes_its_histories() -> None:
    model = small_graph()
    assert lower_convs(model, small_codes("int8"), first=True) == []
    assert [n.op_type for n in model.graph.node] == ["norm_silu_extend", "conv_3x3x3_add", "encode_int8"]
    assert list(model.graph.node[0].output)[1] == "vae_cache_0_out.plain" == model.graph.node[2].input[0]
    assert list(model.graph.node[2].output) == ["vae_cache_0_out"]


def test_what_cannot_be_lowered_is_refused() -> None:
    with pytest.raises(LongtakeError, match="a convolution's input is read elsewhere, too"):
        lower_convs(small_graph(readers=2), small_codes("fp8"), first=False)
    with pytest.raises(
        LongtakeError,
        match=r"only 1x3x3 convolutions behind an upsampling are folded\n  got: a.conv behind stream_extend",
    ):
        lower_convs(up_graph("stream_extend"), small_codes("fp8"), first=False)
    with pytest.raises(LongtakeError, match=r"not ops of the graph\n  got: \['b.conv'\]"):
        lower_convs(small_graph(), ConvCodes({"b.conv": "fp8"}), first=False)


def test_what_was_exported_or_built_with_an_op_that_is_gone_is_refused_with_the_commands(tmp_path: Path) -> None:
    refused = r"unknown op\n  got: upsample_time_fp8[\s\S]*longtake export --force, then longtake engines"
    model = up_graph()
    model.graph.node[0].op_type = "upsample_time_fp8"
    with pytest.raises(LongtakeError, match=refused):  # an export, as it is built
        segments_from_onnx(model, "vae_steady")
    old = library_decoder_steps(TINY, "fp8")
    steps = [replace(s, name="upsample_time_fp8") if s.name == "encode_time_fp8" else s for s in old.steps]
    replace(old, steps=tuple(steps)).write(tmp_path / "vae_steady.segments.json")
    with pytest.raises(LongtakeError, match=refused):  # engines, as they are opened
        planned_steps(SegmentedGraph.read(tmp_path / "vae_steady.segments.json"), {s.name: 0 for s in old.segments})


@pytest.mark.slow
def test_frames_keep_their_likeness(tmp_path: Path) -> None:
    """The short form of what docs/measurements/vae_conv8_tiny.json holds in full."""
    found = tmp_path / "found.json"
    words = [
        "experiment",
        "vae-codes",
        "--clips",
        "3",
        "--frames",
        "9",
        "--seconds",
        "1",
        "--conv",
        "calibrated",
        "fp8",
    ]
    assert main([*words, "--json", str(found)]) == 0
    report = json.loads(found.read_text())
    assert all(row["psnr_db"] > 45 for row in report["clips"].values())
    assert report["stream"]["frames"] == 24 and report["stream"]["psnr_db"] > 45


@pytest.mark.long
def test_frames_keep_their_likeness_on_many_clips_and_over_a_minute(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    assert main(["experiment", "vae-codes", "--clips", "64", "--seconds", "60", "--json", str(found)]) == 0
    report = json.loads(found.read_text())
    curve = report["stream"]["db_by_second"]
    assert len(curve) == 60 and min(curve) > 45
    ends = torch.tensor(curve[:10]).mean(), torch.tensor(curve[-10:]).mean()
    assert ends[1] > ends[0] - 3, "codes in the histories do not add up"
