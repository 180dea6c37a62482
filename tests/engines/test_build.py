"""Plans are built, checked against the spec, kept when up to date, and refused where they cannot be built."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from longtake.engines import build as build_module
from longtake.engines import compile as compile_module
from longtake.engines.build import build_recipe, require_buildable
from longtake.engines.compile import PlanJob, check_network, engine_from_onnx
from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.files import read_json, write_json
from longtake.formats import bundle as bundle_module
from longtake.formats.bundle import Bundle
from longtake.formats.exported import Export
from longtake.formats.plan import PlanManifest, manifest_path
from longtake.formats.recipe import Recipe, recipe_named
from longtake.machine.flavour import Flavour, flavour_for
from longtake.plugins.spec import DOMAIN
from longtake.training.models.wan.family import Wan
from longtake.version import __version__

_spec = importlib.util.spec_from_file_location("miniature", Path(__file__).with_name("miniature.py"))
miniature = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(miniature)

RTX_17 = Flavour("tensorrt_rtx", "1.7.1.116", None, "test")
RTX_16 = Flavour("tensorrt_rtx", "1.6.1.120", None, "test")
FULL = Flavour("tensorrt", "10.13.0", None, "test")


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    try:
        found = flavour_for(None)
    except UnavailableError as error:
        pytest.skip(str(error))
    if not found.version.startswith("1.7"):
        pytest.skip(f"these tests build for 8.9 ahead of time with TensorRT-RTX 1.7, here is {found.label}")
    return found


@pytest.mark.parametrize(
    ("recipe", "flavour", "machine", "says"),
    [
        ("tiny_w4a16_sm90", RTX_16, None, "got: no GPU"),
        ("tiny_w4a16_sm90", RTX_16, "8.9", "got: a GPU of compute capability 8.9"),
        ("tiny_w4a16_sm90", RTX_17, "9.0", "refuse compute capability 9.0"),
        ("tiny_bf16_sm89", FULL, None, "cannot build for it ahead of time"),
        ("tiny_nvfp4_sm120", RTX_16, None, "before 1.7 cannot load plugins"),
    ],
)
def test_what_cannot_be_built_is_said_before_work_starts(
    recipe: str, flavour: Flavour, machine: str | None, says: str
) -> None:
    with pytest.raises(UnavailableError) as caught:
        require_buildable(recipe_named(recipe), flavour, machine)
    assert says in str(caught.value) and "fix:" in str(caught.value)


def test_fp4_arithmetic_for_ada_is_refused() -> None:
    with pytest.raises(UnavailableError, match="no FP4 arithmetic"):
        require_buildable(replace(recipe_named("tiny_nvfp4_sm120"), compute_capability="8.9"), RTX_17, None)


@pytest.mark.parametrize("name", ["tiny_nvfp4_sm120", "tiny_w4a16_sm89", "tiny_bf16_sm89"])
def test_shipped_ahead_of_time_recipes_are_buildable_without_a_gpu(name: str) -> None:
    require_buildable(recipe_named(name), RTX_17, None)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A segmented recipe that builds without a GPU; its only network is the miniature."""
    monkeypatch.setattr(Wan, "networks", lambda self, preset: ("dit",))
    return replace(recipe_named("tiny_bf16_sm90"), compute_capability="8.9")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "onnx"
    folder.mkdir()
    onnx.save(miniature.model_of_layers(4), folder / "dit.onnx")
    Export("tiny_bf16", "tiny", "bf16", "bf16", {}, ("red", "seven"), inputs="abc").write(folder)
    return folder


def test_segment_plans_are_built_once_and_again_only_when_something_changed(
    flavour: Flavour, recipe: Recipe, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engines"

    def run() -> list[tuple[str, bool]]:
        return [(r.path.name, r.skipped) for r in build_recipe(recipe, exported, out, flavour, None, False)]

    names = ["dit_seg0.plan", "dit_seg1.plan", "dit_seg2.plan"]
    assert run() == [(name, False) for name in names]
    assert run() == [(name, True) for name in names]
    # Other weights are other inputs of the same plans; only small constants of a lone segment are part of its plan.
    onnx.save(miniature.model_of_layers(4, seed=1), exported / "dit.onnx")
    assert run() == [(names[0], False), (names[1], True), (names[2], True)]
    (out / names[1]).write_bytes(b"damaged")
    write_json(manifest_path(out / names[2]), {**read_json(manifest_path(out / names[2])), "version": "1.6.1.120"})
    assert run() == [(names[0], True), (names[1], False), (names[2], False)]
    assert not list(out.glob(".*"))


def test_a_fused_build_over_a_segmented_one_leaves_no_cut_behind(
    flavour: Flavour, recipe: Recipe, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network whose cut is described in the folder is run cut, whatever plans lie there."""
    monkeypatch.setattr(build_module, "engine_from_onnx", lambda *_: (b"a plan", 1))
    out = tmp_path / "engines"
    build_recipe(recipe, exported, out, flavour, None, False)
    assert (out / "dit.segments.json").is_file()
    build_recipe(replace(recipe, mode="fused"), exported, out, flavour, None, False)
    assert (out / "dit.plan").is_file() and not (out / "dit.segments.json").exists()


def test_an_interrupted_build_leaves_no_plan(
    flavour: Flavour, recipe: Recipe, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(compile_module.BuildProgress):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.bar.update = lambda steps: os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C during a callback

    monkeypatch.setattr(compile_module, "BuildProgress", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        build_recipe(recipe, exported, tmp_path / "engines", flavour, None, False)
    assert not list((tmp_path / "engines").glob("*.plan*"))


def test_a_missing_or_damaged_onnx_file_is_an_error(
    flavour: Flavour, recipe: Recipe, exported: Path, tmp_path: Path
) -> None:
    (exported / "dit.onnx").write_bytes((exported / "dit.onnx").read_bytes()[:2000])
    with pytest.raises(IntegrityError, match="not a readable ONNX model"):
        build_recipe(recipe, exported, tmp_path / "engines", flavour, None, False)
    (exported / "dit.onnx").unlink()
    with pytest.raises(LongtakeError, match="does not exist"):
        build_recipe(recipe, exported, tmp_path / "engines", flavour, None, False)


def test_a_network_that_is_not_the_specs_is_refused(flavour: Flavour) -> None:
    model = miniature.single(onnx.helper.make_node("Identity", ["x"], ["y"]), [miniature.feeds_for(1)["latent"]])
    wrong = {"inputs": [["x", "bf16", [4, 32]]], "outputs": [["y", "fp32", [4, 32]]], "aliases": [], "profile": []}
    with pytest.raises(IntegrityError, match="inputs differ from the engine spec") as caught:
        engine_from_onnx(PlanJob("net", model, "", wrong), "8.9", flavour, False)
    assert "got: x ('fp32', [4, 32])" in str(caught.value)


class Layer:
    """A PLUGIN_V3 layer of a parsed network."""

    type = "PLUGIN_V3"

    def __init__(self, op: str, inputs: list[str], outputs: list[str]) -> None:
        self.plugin = SimpleNamespace(plugin_name=op)
        self.get_input = lambda i: SimpleNamespace(name=inputs[i])
        self.get_output = lambda i: SimpleNamespace(name=outputs[i])


def network_of(*layers: Any) -> Any:
    none = {"num_inputs": 0, "num_outputs": 0, "get_input": None, "get_output": None}
    return SimpleNamespace(**none, num_layers=len(layers), get_layer=lambda i: layers[i])


def test_aliases_are_those_of_the_op_that_a_layer_says_it_is() -> None:
    """Of two ops with four inputs and one output, one writes in place."""
    trt = SimpleNamespace(LayerType=SimpleNamespace(PLUGIN_V3="PLUGIN_V3"), IPluginV3Layer=Layer)
    norm = Layer("norm_modulate_fp8", ["x", "e", "table", "factor"], ["n"])
    write = Layer("kv_cache_write_bf16", ["k", "v", "cache_in", "slot"], ["cache_out"])
    spec = {"inputs": [], "outputs": [], "aliases": [["cache_out", "cache_in"]], "profile": []}
    plugins = Counter(["norm_modulate_fp8", "kv_cache_write_bf16"])
    job = PlanJob("net", Path("net.onnx"), "", spec, plugins)
    for layers in ((norm, write), (write, norm)):
        check_network(trt, network_of(*layers), job)
    with pytest.raises(IntegrityError, match="in-place outputs differ"):
        check_network(trt, network_of(norm, write), replace(job, spec={**spec, "aliases": []}))
    with pytest.raises(IntegrityError, match=r"custom ops did not become plugins(.|\n)*'gelu_quantize_fp8': 1"):
        check_network(trt, network_of(norm, write), replace(job, plugins=Counter(["gelu_quantize_fp8", *plugins][:2])))


@pytest.fixture
def bundle(flavour: Flavour, recipe: Recipe, exported: Path, tmp_path: Path) -> Iterator[Path]:
    results = build_recipe(recipe, exported, tmp_path / "engines", flavour, None, False)
    Bundle.of(tmp_path / "engines", recipe, flavour, exported, [r.path for r in results]).write()
    yield tmp_path / "engines"


def test_a_bundle_finds_what_it_was_built_from_even_when_moved(bundle: Path, recipe: Recipe, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("onnx", "engines"):
        (tmp_path / name).rename(moved / name)
    opened = Bundle.read(moved / "engines")
    assert opened.recipe == recipe and opened.vocabulary == ("red", "seven")
    assert opened.onnx_file("dit.onnx") == (moved / "onnx" / "dit.onnx").resolve()
    assert opened.check_file(moved / "engines" / "dit.segments.json").is_file()


def test_a_bundle_of_an_earlier_version_says_how_to_build_it_again(bundle: Path) -> None:
    path = bundle / bundle_module.NAME
    write_json(path, {key: value for key, value in read_json(path).items() if key not in ("format", "digest")})
    with pytest.raises(IntegrityError, match="made by an older version(.|\n)*fix: build it again: longtake engines"):
        Bundle.read(bundle)


def test_a_bundle_names_manifests_and_versions(bundle: Path, flavour: Flavour) -> None:
    opened = Bundle.read(bundle)
    assert {f"{name}.json" for name in opened.files if name.endswith(".plan")} <= opened.files.keys()
    assert opened.versions["longtake"] == __version__
    manifest = PlanManifest.read(next(iter(bundle.glob("*.plan"))))
    assert manifest.longtake == __version__ and manifest.cuda == flavour.cuda == "13"
    opened.require_flavour(flavour, bundle)
    for other, says in (
        (replace(opened, version="1.6"), "by another TensorRT"),
        (replace(opened, versions={}), "by another version of longtake"),
    ):
        with pytest.raises(
            UnavailableError, match=f"were built {says}(.|\n)*fix: build it again: longtake engines --recipe"
        ):
            other.require_flavour(flavour, bundle)


def test_a_link_to_itself_is_no_folder_of_exported_files(bundle: Path) -> None:
    path = bundle / bundle_module.NAME
    bundle_module.KIND.write({**read_json(path), "onnx": "loop"}, path)
    (bundle / "loop").symlink_to("loop")
    with pytest.raises(IntegrityError, match="not an engine bundle(.|\n)*onnx: "):
        Bundle.read(bundle)


def test_a_bundle_refuses_files_that_changed(bundle: Path) -> None:
    opened = Bundle.read(bundle)
    (bundle / "dit.segments.json").write_text("{}")
    with pytest.raises(IntegrityError, match="not the file that the engines were built with"):
        opened.check_file(bundle / "dit.segments.json")
    with pytest.raises(IntegrityError, match="listed in bundle.json"):
        opened.check_file(bundle / "other.json")
    with open(opened.onnx / "dit.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="fix: build it again"):
        opened.onnx_file("dit.onnx")


def test_a_folder_without_a_bundle_says_what_makes_one(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="holds no engines") as caught:
        Bundle.read(tmp_path)
    assert "longtake engines --recipe" in str(caught.value)
    bundle_module.KIND.write({}, bundle / bundle_module.NAME)
    with pytest.raises(IntegrityError, match="not an engine bundle"):
        Bundle.read(bundle)


# ---- fused, with plugins, ahead of time ----------------------------------------------------------------------------


def small_dit(precision: str, cache: str, folder: Path) -> PlanJob:
    """A DiT of two layers with random weights, exported and lowered."""
    from untrained import random_models

    from longtake.export.files import write_onnx
    from longtake.export.functions import attach_functions
    from longtake.export.lower import lower
    from longtake.export.onnx_from_model import onnx_from_model
    from longtake.export.weights import stored_tensors
    from longtake.training.models.presets import TINY
    from longtake.training.models.wan.networks import DiTStep
    from longtake.training.models.wan.spec import dit_spec

    preset = replace(TINY, dit=replace(TINY.dit, layers=2))
    models, spec = random_models(preset), dit_spec(preset, cache)
    model = onnx_from_model(DiTStep(models.dit, cache).eval(), spec)
    linears = [name for name in models.amax if "cross_attn.k" not in name and "cross_attn.v" not in name]
    lowered = lower(model, precision, linears, models.amax)
    attach_functions(model)
    plugins = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)
    content = stored_tensors(model, models.dit.state_dict(), precision, lowered, models.amax)
    write_onnx(model, folder / "dit.onnx", content)
    return PlanJob("dit", folder / "dit.onnx", "", spec.as_json(), plugins)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "cache", "target", "others"),
    [
        ("nvfp4", "nvfp4", "12.0", {}),
        ("w4a16", "nvfp4", "8.9", {"nvfp4_dequantize": 16}),
        ("bf16", "bf16", "8.9", {}),
    ],
)
def test_fused_engines_build_with_plugins_inside(
    flavour: Flavour, tmp_path: Path, precision: str, cache: str, target: str, others: dict[str, int]
) -> None:
    ops = {"qk_norm_rope": 2, f"sink_attention_{cache}": 2, f"kv_cache_write_{cache}": 2, **others}
    job = small_dit(precision, cache, tmp_path)
    assert job.plugins == ops
    plan, layers = engine_from_onnx(job, target, flavour, False)
    assert len(plan) > 100_000 and layers > sum(ops.values())
    moved = {**job.spec, "aliases": job.spec["aliases"][1:]}
    with pytest.raises(IntegrityError, match="in-place outputs differ"):
        engine_from_onnx(replace(job, spec=moved), target, flavour, False)
    if precision == "bf16":
        _check_silent_inlining(job, flavour)


def _check_silent_inlining(job: PlanJob, flavour: Flavour) -> None:
    """Without the plugin attributes the parser inlines the function bodies and says nothing."""
    model = onnx.load(job.source, load_external_data=False)
    for node in model.graph.node:
        kept = [a for a in node.attribute if a.name not in ("plugin_namespace", "plugin_version")]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(model, job.source)
    with pytest.raises(IntegrityError, match="custom ops did not become plugins"):
        engine_from_onnx(job, "8.9", flavour, False)
