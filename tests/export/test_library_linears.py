"""Recipes whose linears a library runs, from export to plans: parity, where the graph is cut, what is shared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from held_weights import weights_from_models

from longtake.accuracy.compare import compare_networks
from longtake.accuracy.rows import require_gate
from longtake.engines.build import segment_job
from longtake.engines.compile import engine_from_onnx
from longtake.engines.segment import CutNetwork, segments_from_onnx
from longtake.errors import IntegrityError, LongtakeError
from longtake.export.files import write_onnx
from longtake.export.package import export_package
from longtake.export.structure import Expected, check_structure
from longtake.formats.exported import Export
from longtake.formats.onnx_file import read_onnx
from longtake.formats.recipe import Recipe, recipe_from_file
from longtake.machine.flavour import flavour_for
from longtake.paths import REPOSITORY
from longtake.runtime.backends.segments.arena import aliases_of, memory_layout, storage_bytes
from longtake.training.models.wan.spec import dit_spec

pytestmark = pytest.mark.slow  # three exports

PRECISIONS = ("fp8", "bf16", "w4a16")
Package = tuple[Recipe, Path]


@pytest.fixture(scope="module", params=PRECISIONS)
def exported(request, small_models, small_graphs, tmp_path_factory) -> Package:  # type: ignore[no-untyped-def]
    recipe = recipe_from_file(REPOSITORY / "docs" / "recipes_library" / f"tiny_{request.param}_library_sm90.yaml")
    folder = tmp_path_factory.mktemp(request.param)
    export_package(small_graphs, recipe, folder, "inputs", lambda words: None, weights_from_models(small_models))
    return recipe, folder


@pytest.fixture(scope="module")
def cut(exported: Package) -> CutNetwork:
    return segments_from_onnx(read_onnx(exported[1] / "dit.onnx", "small"), "dit")


def test_every_network_agrees_with_pytorch(exported: Package, small_models) -> None:  # type: ignore[no-untyped-def]
    recipe, folder = exported
    rows = list(compare_networks(small_models, recipe, folder))
    for row in rows:
        assert row.error < (2e-2 if recipe.precision == "fp8" and row.network in ("dit", "context") else 1e-5), row
    require_gate(rows, "test")


def test_a_package_of_linears_in_the_engine_is_another(exported: Package, small_models) -> None:  # type: ignore[no-untyped-def]
    recipe, folder = exported
    assert recipe.onnx_name == f"tiny_{recipe.precision}_library_vae_library"
    with pytest.raises(LongtakeError, match="are of another recipe"):
        Export("tiny", "tiny", recipe.precision, recipe.cache, {}, ()).require_recipe(recipe, folder)
    with pytest.raises(IntegrityError, match="another number of custom ops"):
        spec = dit_spec(small_models.preset, recipe.cache)
        check_structure(folder / "dit.onnx", Expected(spec, recipe.precision, recipe.cache, 2))


@pytest.mark.parametrize("exported", ["w4a16"], indirect=True)
def test_a_weight_without_its_scale_is_refused(exported: Package, small_models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """As it is where the engine multiplies, which applies the scale afterwards; a library does not."""
    recipe, folder = exported
    export, model = Export.read(folder), read_onnx(folder / "dit.onnx")
    shapes = {name: small_models.dit.get_parameter(f"{name}.weight").shape for name in export.networks["dit"].linears}
    expected = Expected(
        dit_spec(small_models.preset, recipe.cache), "w4a16", recipe.cache, LAYERS, shapes, library=True
    )
    check_structure(folder / "dit.onnx", expected)
    node = next(node for node in model.graph.node if node.op_type == "nvfp4_dequantize_scaled")
    node.op_type = "nvfp4_dequantize"
    del node.input[2]
    write_onnx(model, tmp_path / "dit.onnx")
    with pytest.raises(IntegrityError, match=r"another number of custom ops\n  got: .*'nvfp4_dequantize': 1"):
        check_structure(tmp_path / "dit.onnx", expected)


LAYERS = 2
BETWEEN = {
    "norm_modulate": 1,
    "gated_norm_affine": LAYERS,
    "residual_norm_modulate": LAYERS,
    "gated_norm_modulate": LAYERS - 1,
}
OWN = {"rms_norm": LAYERS, "cross_attention": LAYERS, "qk_norm_rope": LAYERS}


def test_a_layer_is_ops_and_nothing_of_it_is_left_to_the_engine(exported: Package, cut: CutNetwork) -> None:
    """Two plans: the embeddings before the first op, the last block's residual and the head behind the last one."""
    fp8 = exported[0].precision == "fp8"
    kinds = [step.kind for step in cut.graph.steps]
    assert [i for i, kind in enumerate(kinds) if kind == "segment"] == [0, len(kinds) - 1]
    ops = Counter(step.name for step in cut.graph.steps if step.kind == "op")
    linears = {"linear_fp8": 4 * LAYERS - 1, "linear_rows_fp8": 4 * LAYERS + 1, "quantize_fp8": 2 * LAYERS,
               "gelu_quantize_fp8": LAYERS} if fp8 else {"linear_bf16": 7 * LAYERS, "linear_gelu_bf16": LAYERS}  # fmt: skip
    unpacked = [step.name for step in cut.graph.steps if step.kind == "unpack"]
    assert unpacked == ["nvfp4_dequantize_scaled"] * (8 * LAYERS if exported[0].precision == "w4a16" else 0)
    between = {f"{name}_fp8" if fp8 else name: count for name, count in BETWEEN.items()}
    cache = {f"kv_cache_write_{exported[0].cache}": LAYERS, f"sink_attention_{exported[0].cache}": LAYERS}
    assert ops == linears | between | OWN | cache


def test_a_layers_ops_run_in_this_order(exported: Package, cut: CutNetwork) -> None:
    names = [step.name.removesuffix("_fp8").removesuffix("_bf16").removesuffix("_rows")
             for step in cut.graph.steps if step.kind == "op"]  # fmt: skip
    short = [name.removesuffix("_nvfp4") for name in names if name != "quantize"]
    first = short[: short.index("gated_norm_modulate") + 1]
    ffn = ["linear", "gelu_quantize"] if exported[0].precision == "fp8" else ["linear_gelu"]
    assert first == [
        "norm_modulate", "linear", "linear", "qk_norm_rope", "linear", "kv_cache_write", "sink_attention", "linear",
        "gated_norm_affine", "linear", "rms_norm", "cross_attention", "linear", "residual_norm_modulate", *ffn, "linear",
        "gated_norm_modulate",
    ]  # fmt: skip


def test_no_segment_multiplies_by_a_weight_of_the_blocks(cut: CutNetwork) -> None:
    packed = {
        name for name in cut.graph.weights if name.startswith("blocks.") and len(cut.graph.tensors[name].shape) == 2
    }
    read = {name for step in cut.graph.steps if step.kind == "segment" for name in step.inputs}
    assert not {name for name in packed if ".weight" in name} & read


def test_a_packed_weight_is_unpacked_right_before_its_product(exported: Package, cut: CutNetwork) -> None:
    """In memory that is free again right after it; 4 bits of it, and the scale, are what lies on the device."""
    steps = cut.graph.steps
    pairs = [(step, after) for step, after in zip(steps, steps[1:]) if step.kind == "unpack"]
    assert bool(pairs) == (exported[0].precision == "w4a16")
    for step, product in pairs:
        (weight,) = step.outputs
        assert product.name in ("linear_bf16", "linear_gelu_bf16") and product.inputs[1] == weight
        assert [s for s in steps if weight in s.inputs] == [product] and weight not in cut.graph.weights
        base = weight.removesuffix(".dequantized")
        assert step.inputs == tuple(f"{base}.{part}" for part in ("values", "scales", "scale"))
        assert set(step.inputs) <= set(cut.graph.weights) and cut.graph.tensors[weight].dtype == "bf16"


def test_activations_cross_in_few_bits(exported: Package, cut: CutNetwork) -> None:
    """What a segment hands on for every token is bf16 or E4M3; an operand of an FP8 product is E4M3."""
    tokens = cut.graph.tensors[next(s for s in cut.graph.steps if s.kind == "op").inputs[0]].shape[0]
    made = [name for step in cut.graph.steps[:-1] if step.kind == "segment" for name in step.outputs]
    kinds = {cut.graph.tensors[name].dtype for name in made if cut.graph.tensors[name].shape[0] == tokens}
    assert kinds == {"bf16"}
    for step in cut.graph.steps:
        if step.name.startswith("linear"):
            kind = "fp8" if exported[0].precision == "fp8" else "bf16"
            assert [cut.graph.tensors[n].dtype for n in step.inputs[:2]] == [kind, kind]
            assert cut.graph.tensors[step.outputs[0]].dtype == "bf16"


def test_a_view_has_the_place_of_what_it_shows_until_both_are_read(cut: CutNetwork) -> None:
    graph = cut.graph
    offsets, _, end = memory_layout(graph, {*graph.inputs, *graph.outputs, *graph.weights})
    shown = {s.outputs[0]: s.inputs[0] for s in graph.steps if s.kind == "view"}
    assert all(offsets[view] == offsets[source] for view, source in shown.items())
    content: dict[int, str] = {}  # first byte -> the tensor written there last
    for step in graph.steps:
        for name in step.inputs:
            if name in offsets:
                assert content[offsets[name]] == shown.get(name, name)
        for name in step.outputs if step.kind != "view" else ():
            if name in offsets and name not in aliases_of(step):
                first, stop = offsets[name], offsets[name] + storage_bytes(graph.tensors[name])
                content = {at: old for at, old in content.items()
                           if at >= stop or at + storage_bytes(graph.tensors[old]) <= first} | {first: name}  # fmt: skip
                assert stop <= end


@pytest.mark.parametrize("target", ["9.0", "8.9"])
def test_every_segment_builds(cut: CutNetwork, target: str) -> None:
    for segment in cut.graph.segments:
        plan, _ = engine_from_onnx(segment_job(segment, cut.models[segment.name]), target, flavour_for(None), False)
        assert plan


def test_factors_are_named_by_what_reads_them(exported: Package) -> None:
    """A rank's graph, in which the exporter counts otherwise, takes the factors of the whole network by name."""
    model = read_onnx(exported[1] / "dit.onnx", "small")
    factors = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith("_factor")}
    assert bool(factors) == (exported[0].precision == "fp8")
    assert all(name.startswith(("blocks_0_", "blocks_1_")) for name in factors)
