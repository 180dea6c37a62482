"""The memory budget: its terms against tensors that are really allocated, what it refuses, and how it is shown."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from untrained import random_models

from longtake import chain
from longtake.commands.main import main
from longtake.dtypes import DTYPES
from longtake.errors import IntegrityError, LongtakeError
from longtake.files import sha256
from longtake.formats.bundle import KIND, Bundle
from longtake.formats.exported import Export
from longtake.formats.memory import CUDA_CONTEXT_BYTES, Budget, Term, Use, budget_table
from longtake.formats.plan import PlanManifest
from longtake.formats.recipe import Recipe, recipe_named
from longtake.formats.segmented_graph import Segment, SegmentedGraph, Step, TensorType
from longtake.machine.flavour import Flavour
from longtake.runtime import sources
from longtake.runtime.backends.base import State
from longtake.runtime.backends.host import HostBackend
from longtake.runtime.backends.segments.vae_first import first_steps
from longtake.runtime.backends.trt import open as trt_open
from longtake.runtime.budget import check as budget_check
from longtake.runtime.budget.check import require_fits
from longtake.runtime.budget.measured import measured_terms, memory_rows, record_arenas
from longtake.runtime.budget.recorded_steps import library_decoder_steps
from longtake.runtime.budget.terms import decoder_weights, terms_of, weight_bytes
from longtake.runtime.budget.use import budget_of
from longtake.runtime.report import conditions_of_run
from longtake.runtime.sources import OpenOptions, Source, backend_from_source, source_from_bundle
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import NETWORKS
from longtake.training.models.presets import TINY, WAN22_TI2V_5B
from longtake.training.models.wan.spec import dit_spec

RECIPE = recipe_named("tiny_bf16_sm90")
EXPORT = Export(RECIPE.onnx_name, RECIPE.preset, RECIPE.precision, RECIPE.cache, {}, (),
                sampling={"steps": 4, "guidance": 1.0, "shift": 5.0})  # fmt: skip
LARGE = recipe_named("wan2.2-ti2v-5b_fp8_sm90")
GB = 10**9


def of(budget: Budget, name: str) -> int:
    return next(term.bytes for term in budget.terms if term.name == name)


# ---- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_bf16_sm90", "tiny_w4a16_sm90"])
def test_the_cache_is_what_a_backend_allocates(name: str) -> None:
    recipe = recipe_named(name)

    class Bare(HostBackend):
        def call(self, network: str, inputs: Any, wanted: Any = None) -> Any:
            raise NotImplementedError

    cache = Bare(recipe, "test", torch.device("cpu")).new_state("dit").tensors.values()
    # A host cache holds fp32 where a GPU's holds bf16; the other parts are the same bytes.
    allocated = sum(t.nbytes // (2 if t.dtype == torch.float32 and recipe.cache == "bf16" else 1)
                    for t in cache)  # fmt: skip
    assert of(budget_of(recipe), "K/V cache") == allocated
    assert of(budget_of(recipe, Use(guided=True)), "K/V cache") == 2 * allocated


def test_weights_are_every_parameter_once() -> None:
    models = random_models(TINY)
    dit = sum(p.numel() for p in models.dit.parameters())
    budget = budget_of(RECIPE)
    assert of(budget, "weights, dit") + of(budget, "weights, context") == 2 * dit
    decoder = sum(p.numel() for p in models.vae.decoder.parameters())
    assert of(budget, "weights, VAE decoder") == pytest.approx(2 * decoder, rel=0.01)
    whole = budget_of(replace(RECIPE, mode="fused"))  # two plans, each with its own
    assert of(whole, "weights, VAE decoder") == pytest.approx(4 * decoder, rel=0.01)


def test_a_lighter_precision_is_lighter_by_its_bits() -> None:
    """The 300 linears of the large model hold 4,907,335,680 weights (reference 1.1)."""
    linears = 4_907_335_680

    def both(precision: str) -> int:
        recipe = replace(LARGE, precision=precision, linears="engine")
        return sum(weight_bytes(recipe, WAN22_TI2V_5B, name) for name in ("dit", "context"))

    assert both("bf16") - both("fp8") == linears
    assert both("bf16") - both("w4a16") == pytest.approx(linears * (2 - 9 / 16), abs=2)
    assert both("nvfp4") == both("w4a16")


def test_the_large_models_known_figures() -> None:
    """K/V cache 2.92 GB in 4 bits and 10.38 in bf16 (reference 3.7); decoder 1.11 GB, its caches 3.22; within 19.4 GB."""
    fp8 = budget_of(LARGE)
    assert of(fp8, "K/V cache") == pytest.approx(2.92 * GB, rel=0.002)
    assert of(budget_of(replace(LARGE, cache="bf16")), "K/V cache") == pytest.approx(10.38 * GB, rel=0.002)
    assert of(fp8, "weights, VAE decoder") == pytest.approx(1.11 * GB, rel=0.01)
    assert of(fp8, "VAE caches") == pytest.approx(3.22 * GB, rel=0.01)
    assert of(fp8, "VAE working memory") == pytest.approx(1.96 * GB, rel=0.01)
    assert budget_of(recipe_named("wan2.2-ti2v-5b_w4a16_sm90")).total() < 15.2 * GB
    assert fp8.total() < 16.6 * GB and not any("text_encoder" in term.name for term in fp8.terms)
    assert any("text encoder" in term.name for term in fp8.apart)


def test_a_worlds_known_figures() -> None:
    """At 704x1280: two slots of states and tails, three equal ones of keys and values, 1.87 GB; every weight once."""
    recipe = recipe_named("sana-wm_bf16_sm90")
    budget, state = budget_of(recipe), family_of(recipe.model).spec(recipe.model, recipe, "dit")
    kept = [binding for binding in state.inputs if binding.name in state.kept.values()]
    assert of(budget, "K/V cache") == sum(DTYPES[b.dtype].bytes(math.prod(map(int, b.shape))) for b in kept)
    assert of(budget, "K/V cache") == pytest.approx(1.87 * GB, rel=0.005)
    with torch.device("meta"):
        dit = family_of(recipe.model).dit(recipe.model)
    parts = [of(budget, f"weights, {name}") for name in ("dit", "context", "camera")]
    assert sum(parts) == 2 * sum(p.numel() for p in dit.parameters()) and min(parts) > 0
    # four latents of 880 tokens, 40 blocks' worth of maps and as much again that a pass reads
    assert of(budget, "a chunk's cameras") == pytest.approx(20 * 4 * 880 * 2240 * 2, rel=0.01)
    lighter = sum(weight_bytes(replace(recipe, precision="fp8"), recipe.model, name) for name in ("dit", "context"))
    linears = sum(dit.get_parameter(f"{name}.weight").numel() for name in family_of(recipe.model).linears(dit))
    assert sum(parts[:2]) - lighter == linears


def test_decoding_elsewhere_moves_its_terms() -> None:
    one, two = budget_of(LARGE), budget_of(LARGE, Use(decode_apart=True))
    assert set(two.peak) == {"generate", "decode"}
    assert two.total("generate") + two.total("decode") == one.total() + CUDA_CONTEXT_BYTES
    assert two.peak["generate"] < one.peak["generate"]
    assert of(budget_of(LARGE, Use(encode=True)), "K/V cache") == of(one, "K/V cache")
    assert budget_of(LARGE, Use(encode=True)).apart[-1].bytes > 0.5 * GB


def graph(network: str) -> SegmentedGraph:
    """x -> [one] -> y -> [two] -> z -> [three] -> out, a MiB each, with 3 MiB of weights."""
    mib = TensorType("int8", (1 << 20,))
    tensors = dict.fromkeys(("x", "y", "z", "out"), mib) | {"w": TensorType("bf16", (3 << 19,))}
    steps = [("one", ("x", "w"), ("y",)), ("two", ("y",), ("z",)), ("three", ("z",), ("out",))]
    segments = tuple(Segment(n, i, o, {t: tensors[t] for t in (*i, *o)}) for n, i, o in steps)
    return SegmentedGraph(network, ("x",), ("out",), ("w",), tensors, segments,
                          tuple(Step("segment", n, i, o) for n, i, o in steps))  # fmt: skip


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    for name in NETWORKS:
        graph(name).write(tmp_path / f"{name}.segments.json")
    (tmp_path / "bundle.json").write_text("{}")
    return tmp_path


def test_built_segments_make_weights_and_arena_exact(engines: Path) -> None:
    budget = budget_of(RECIPE, Use(engines=engines))
    known = {term.name: (term.bytes, term.known) for term in budget.terms}
    assert known["weights, dit"] == known["weights, VAE decoder"] == (3 << 20, "exact")
    assert known["VAE working memory"][1] == "estimated"  # the plans do not say what they want
    for plan, wanted in {"one": 5 << 20, "two": 1 << 20, "three": 0}.items():
        manifest = PlanManifest(f"{plan}.plan", plan, "", 0, "", "", "", "", {}, {}, "", "", scratch_bytes=wanted)
        manifest.write(engines / f"{plan}.plan")
    budget = budget_of(RECIPE, Use(engines=engines))
    known = {term.name: (term.bytes, term.known) for term in budget.terms}
    # `one` runs beside its output, and nothing else is alive then; y and z beside `two`'s scratch are less.
    assert known["VAE working memory"] == (6 << 20, "exact")
    assert known["DiT working memory"] == (6 << 20, "estimated")  # cuDNN's own workspace is not known


class Part:
    """The memory of a cut network, as runtime/backends/segments/network.py keeps it."""

    def __init__(self, name: str, arena: int) -> None:
        self.arena = type("Scratch", (), {"size": arena})()
        self.weight_tensors = [torch.empty(3 << 19, dtype=torch.bfloat16)]


def test_a_run_writes_down_what_only_loaded_engines_tell(engines: Path, toy: Any) -> None:
    toy.networks = {"dit": Part("dit", 7000), "context": Part("context", 7000), "vae_steady": Part("vae_steady", 500)}
    record_arenas(engines, toy)
    budget = budget_of(RECIPE, Use(engines=engines))
    assert of(budget, "DiT working memory") == 7000 and of(budget, "VAE working memory") == 500
    assert {term.known for term in budget.terms if "working" in term.name} == {"measured"}
    found = measured_terms(toy, [State({"keys": torch.zeros(10)})])
    assert found["weights, dit"] == 3 << 20 and found["DiT working memory"] == 7000 and found["K/V cache"] == 40
    assert found["weights, dit"] == of(budget, "weights, dit") and round(found["total"] / 1e9, 3) == 0.123
    (engines / "bundle.json").write_text('{"built": "anew"}')
    assert of(budget_of(RECIPE, Use(engines=engines)), "DiT working memory") != 7000


@pytest.mark.parametrize("content", ["", "[]", '{"bundle": "BUNDLE", "arena_bytes": 5}', '{"arena_bytes": {}}'])
def test_a_damaged_note_is_ignored(engines: Path, content: str) -> None:
    (engines / "memory.json").write_text(content.replace("BUNDLE", sha256(engines / "bundle.json")))
    assert budget_of(RECIPE, Use(engines=engines)) == budget_of(RECIPE, Use(engines=engines))


def test_total_counts_every_spec_dimension() -> None:
    """The slot table is the one dynamic input; it must not fall out of the sum."""
    dit = dit_spec(TINY, "bf16")
    assert [b.name for b in dit.inputs if any(isinstance(n, str) for n in b.shape)] == ["table"]


def test_the_larger_models_vae_in_an_engine_fits_the_promise() -> None:
    """As plans of it say: 4.05 GB (built by TensorRT-RTX 1.6.1 and 1.7.1)."""
    engine = budget_of(replace(LARGE, vae_ops="engine"))
    assert of(engine, "VAE working memory") == pytest.approx(4.05 * GB, rel=0.02)
    assert engine.total() < 19.4 * GB


def test_caches_that_a_run_kept_twice_are_in_the_next_budget(engines: Path, toy: Any) -> None:
    toy.networks = {"dit": Part("dit", 7000), "vae_steady": Part("vae_steady", 500)}
    toy.twice_bytes = 4096
    once = of(budget_of(RECIPE, Use(engines=engines)), "VAE caches")
    record_arenas(engines, toy)
    assert of(budget_of(RECIPE, Use(engines=engines)), "VAE caches") == once + 4096
    assert of(budget_of(replace(RECIPE, vae_ops="library"), Use(engines=engines)), "VAE caches") < once + 4096


def test_what_a_step_added_stands_beside_what_was_promised_for_it() -> None:
    budget = {"terms": [{"name": "a", "bytes": 2 * GB}, {"name": "b", "bytes": 3 * GB}]}
    log = [{"step": "one", "terms": ["a"], "bytes": 2 * GB, "torch_bytes": GB, "reserved_bytes": 3 * GB // 2},
           {"step": "two", "terms": ["b", "a"], "bytes": 6 * GB, "torch_bytes": 5 * GB, "reserved_bytes": 5 * GB}]  # fmt: skip
    one, two = memory_rows(log, budget)
    assert (one["added_gb"], one["promised_gb"], one["slack_gb"], one["outside_gb"]) == (2.0, 2.0, 0.5, 0.5)
    assert (two["added_gb"], two["promised_gb"], two["outside_gb"]) == (4.0, 3.0, 1.0)  # "a" was counted already


# ---- recorded with the engines ---------------------------------------------------------------------------------------


def every_use(**more: Any) -> list[Use]:
    switches = ("guided", "decode", "decode_apart", "encode")
    return [Use(**(more | dict(zip(switches, values)))) for values in product((False, True), repeat=4)]


@pytest.fixture
def bundle(engines: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], Bundle]:
    """bundle(recipe) is that of `engines`, described as `longtake engines` does; nothing is built."""

    def make(recipe: Recipe) -> Bundle:
        exported = engines / "exports" / recipe.onnx_name
        exported.mkdir(parents=True)
        replace(EXPORT, onnx_name=recipe.onnx_name).write(exported)
        for plan in ("one", "two", "three"):
            PlanManifest(f"{plan}.plan", plan, "", 0, "", "", "", "", {}, {}, "", "", scratch_bytes=5 << 20).write(
                engines / f"{plan}.plan"
            )
        monkeypatch.setattr(chain, "build_recipe", lambda *words: [])
        monkeypatch.setattr(Export, "require_recipe", lambda *words, **more: None)
        flavour = Flavour("tensorrt_rtx", "1.6.1", None, "a test")
        chain.build(recipe, exported, engines, flavour, None, force=True)
        return Bundle.read(engines)

    return make


@pytest.mark.parametrize("name", ["tiny_bf16_sm90", "tiny_nvfp4_sm120"])
def test_the_bundle_records_every_use_s_budget(
    name: str, bundle: Callable[[Recipe], Bundle], engines: Path, toy: Any
) -> None:
    recipe = recipe_named(name)
    recorded = bundle(recipe).memory
    assert recorded == terms_of(recipe, engines)
    toy.networks, toy.twice_bytes = {"dit": Part("dit", 7000), "vae_steady": Part("vae_steady", 500)}, 4096
    for _ in range(2):  # the second time with what a run wrote down
        for use, known in zip(every_use(engines=engines), every_use(engines=engines, recorded=recorded), strict=True):
            assert budget_of(recipe, use) == budget_of(recipe, known)
        record_arenas(engines, toy)
    assert of(budget_of(recipe, Use(engines=engines, recorded=recorded)), "DiT working memory") == 7000


def test_the_large_model_s_budget_is_added_up_from_its_terms() -> None:
    recorded = terms_of(LARGE)
    for use in every_use()[-2:]:
        assert budget_of(LARGE, use) == budget_of(LARGE, replace(use, recorded=recorded))


def test_opening_built_engines_computes_no_term(
    bundle: Callable[[Recipe], Bundle], engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that module nor a model on the meta device is needed."""
    bundle(RECIPE)
    said: list[Budget] = []
    monkeypatch.delitem(sys.modules, "longtake.runtime.budget.terms")
    monkeypatch.delattr(sys.modules["longtake.runtime.budget"], "terms")
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self: pytest.fail(f"{type(self)} was made"))
    monkeypatch.setattr(sources, "choose_backend", lambda source, asked: sources.Choice("segmented", "a test"))
    monkeypatch.setattr(sources, "_require_device", lambda *words: None)
    monkeypatch.setattr(budget_check, "free_memory", lambda device: ("cuda:0", 100 * GB))
    monkeypatch.setattr(trt_open, "backend_from_engines", lambda *words, **more: Idle())
    source = source_from_bundle(engines)
    backend_from_source(source, "auto", None, opening=OpenOptions(guided=True, announce=said.append))
    assert "longtake.runtime.budget.terms" not in sys.modules
    monkeypatch.undo()
    assert said == [budget_of(RECIPE, Use(guided=True, engines=engines))]


def test_engines_of_an_earlier_version_are_budgeted_as_before(
    bundle: Callable[[Recipe], Bundle], engines: Path
) -> None:
    bundle(RECIPE)
    written = json.loads((engines / "bundle.json").read_text())
    assert written.pop("memory")
    KIND.write(written, engines / "bundle.json")
    source = source_from_bundle(engines)
    assert source.memory == ()
    assert budget_of(RECIPE, Use(engines=engines)) == budget_of(RECIPE, Use(engines=engines, recorded=source.memory))


@pytest.mark.parametrize("damage", [{"bytes": "many"}, {"known": "guessed"}, {"when": "never"}])
def test_a_damaged_record_is_refused(bundle: Callable[[Recipe], Bundle], engines: Path, damage: dict[str, Any]) -> None:
    bundle(RECIPE)
    written = json.loads((engines / "bundle.json").read_text())
    written["memory"][0] |= damage
    KIND.write(written, engines / "bundle.json")
    with pytest.raises(IntegrityError, match="is not an engine bundle"):
        source_from_bundle(engines)


class Idle:
    """A backend that took no memory that is known."""

    networks: dict[str, Any] = {}


# ---- refusal ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_check, "free_memory", lambda device: ("cuda:0 (a small one, 24 GB)", 20 * GB))
    large = recipe_named("wan2.2-ti2v-5b_bf16_sm90")
    with pytest.raises(LongtakeError) as caught:
        budget_check.check_memory(large, Use(guided=True), torch.device("cuda:0"))
    said = str(caught.value)
    assert "wan2.2-ti2v-5b_bf16_sm90 does not fit the memory of cuda:0 (a small one, 24 GB)" in said
    assert "got: 20.00 GB free" in said and "K/V cache 20.76" in said
    assert "--guidance 1" in said and "--decode-device" in said and "close what else" in said
    with pytest.raises(LongtakeError, match="take recipe wan2.2-ti2v-5b_fp8_sm90, which needs 1[0-9.]+ GB"):
        budget_check.check_memory(large, Use(), torch.device("cuda:0"))
    budget_check.check_memory(LARGE, Use(), torch.device("cuda:0"))


def test_each_gpu_has_its_own_limit() -> None:
    budget = Budget("r", (Term("a", 5 * GB, "exact"), Term("b", 9 * GB, "exact", "decode")), one_gpu=False)
    require_fits(budget, {"generate": ("cuda:0", 5 * GB), "decode": ("cuda:1", 9 * GB)}, [])
    with pytest.raises(LongtakeError, match="does not fit the memory of cuda:1"):
        require_fits(budget, {"generate": ("cuda:0", 50 * GB), "decode": ("cuda:1", 8 * GB)}, [])


def test_the_budget_is_announced_before_a_backend_is_opened(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be imported or allocated before it is known to fit."""
    said: list[Budget] = []
    opened: list[str] = []
    monkeypatch.setattr(sources, "choose_backend", lambda source, asked: sources.Choice("segmented", "a test"))
    monkeypatch.setattr(sources, "_require_device", lambda *words: None)
    monkeypatch.setattr(trt_open, "backend_from_engines", lambda name, *words, **more: opened.append(name))
    monkeypatch.setattr(budget_check, "free_memory", lambda device: ("cuda:0", 1000))
    source = Source(RECIPE, engines, engines, None)
    with pytest.raises(LongtakeError, match="does not fit the memory of cuda:0"):
        backend_from_source(source, "auto", None, opening=OpenOptions(guided=False, announce=said.append))
    assert len(said) == 1 and said[0].recipe == RECIPE.name and not opened


# ---- how it is shown -------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--recipe", "tiny_bf16_sm90", "--guidance", "1"]) == 0
    table = capsys.readouterr().out
    for part in ("K/V cache", "weights, dit", "CUDA context", "all of it", "estimated", "exact"):
        assert part in table
    assert main(["budget", "--recipe", "tiny_bf16_sm90", "--guidance", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["total_gb"] == pytest.approx(sum(term["gb"] for term in shown["terms"]), abs=0.01)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Engines of a student of the tiny preset, which itself is sampled with guidance 3; nothing is built."""
    exported, folder = tmp_path / "exports" / RECIPE.onnx_name, tmp_path / "engines" / RECIPE.name
    exported.mkdir(parents=True)
    EXPORT.write(exported)
    folder.mkdir(parents=True)
    Bundle.of(folder, RECIPE, Flavour("tensorrt_rtx", "1.6.1", None, "a test"), exported, []).write()
    return folder


def budgeted(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["budget", *words, "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_a_student_s_engines_take_one_cache(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = budgeted(capsys, "--engines", str(student))
    assert recorded == budgeted(capsys, "--engines", str(student), "--guidance", "1")
    guided = budgeted(capsys, "--engines", str(student), "--guidance", "3")
    caches = [next(t["bytes"] for t in shown["terms"] if t["name"] == "K/V cache") for shown in (recorded, guided)]
    assert caches[1] == 2 * caches[0] and (recorded["guidance"], guided["guidance"]) == (1.0, 3.0)
    assert main(["budget", "--engines", str(student)]) == 0
    assert "guidance 1 (as the export records)" in capsys.readouterr().out


def test_without_a_record_guidance_is_the_preset_s(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = tmp_path / "exports" / RECIPE.onnx_name
    replace(EXPORT, sampling=None).write(exported)
    assert budgeted(capsys, "--engines", str(student))["guidance"] == 3.0
    (exported / "export.json").unlink()  # the engines went to another machine alone
    assert budgeted(capsys, "--engines", str(student))["guidance"] == 3.0


@pytest.mark.parametrize(
    ("has_engines", "has_export", "guidance"), [(True, False, 1.0), (False, True, 1.0), (False, False, 3.0)]
)
def test_a_recipe_s_budget_is_of_what_there_is_of_it(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    has_engines: bool, has_export: bool, guidance: float,
) -> None:  # fmt: skip
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path))
    place = tmp_path / "models" / "student" / RECIPE.name
    place.mkdir(parents=True)
    if has_engines:
        (place / "engines").symlink_to(student)
    if has_export:
        (place / "onnx").symlink_to(tmp_path / "exports" / RECIPE.onnx_name)
    assert budgeted(capsys, "--recipe", RECIPE.name)["guidance"] == guidance


def test_the_table_names_both_gpus() -> None:
    text = budget_table(budget_of(RECIPE, Use(decode_apart=True)))
    assert "the GPU to generate" in text and "the GPU to decode" in text and "decode GPU" in text


def test_the_report_holds_the_budget(toy: Any) -> None:
    fields = conditions_of_run(toy, budget_of(RECIPE))
    assert fields["budget"]["total_gb"] > 0.5 and fields["decode_device"] == "cpu"
    assert conditions_of_run(toy)["budget"] is None


def test_a_decoder_of_codes_is_counted_once(tmp_path: Path) -> None:
    """Where the later steps stand for the first one, the first network's weights, under other names, are not loaded."""
    coded, plain = library_decoder_steps(TINY, "fp8"), library_decoder_steps(TINY)
    coded.write(tmp_path / "vae_steady.segments.json")
    plain.write(tmp_path / "vae_first.segments.json")
    term = decoder_weights(recipe_named("tiny_fp8_sm90"), TINY, tmp_path)
    assert first_steps(coded) and set(plain.weights) - set(coded.weights)
    of_codes = [DTYPES[(t := coded.tensors[name]).dtype].bytes(math.prod(map(int, t.shape))) for name in coded.weights]
    assert (term.bytes, term.known) == (sum(of_codes), "exact")
