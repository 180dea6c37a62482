"""The benchmark on a CPU: its arithmetic, its weights, its report; timings of a CPU are never figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from engines_here import on_engines
from torch.utils.flop_counter import FlopCounterMode

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.formats.model_name import folder_of
from longtake.formats.recipe import recipe_named
from longtake.paths import REPOSITORY
from longtake.plugins.cross_attention.reference import dense_cross_attention
from longtake.plugins.nvfp4.reference import Packed, dequantize
from longtake.plugins.spec import DOMAIN
from longtake.runtime.backends.reference import ReferenceBackend
from longtake.runtime.bench import random_weights as weights
from longtake.runtime.bench import torch_side
from longtake.runtime.bench.measure import measure
from longtake.runtime.bench.options import BenchOptions, options_from_json
from longtake.runtime.bench.plot import write_plot
from longtake.runtime.bench.ranks_side import communication, measure_ranks
from longtake.runtime.bench.result import ratios, report_of, table
from longtake.runtime.bench.roofline import chunk_work, dit_pass, roofline, vae_latent
from longtake.runtime.bench.torch_backend import PlainTorchBackend
from longtake.runtime.bench.torch_dit import PlainDiT
from longtake.runtime.bench.torch_side import random_dit, random_vae
from longtake.runtime.bench.torch_vae import DecoderState, PlainDecoder
from longtake.runtime.report import conv_counts
from longtake.training.models.presets import TINY, WAN22_TI2V_5B, DiTConfig, Preset
from longtake.training.models.random_weights import fill
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid
from longtake.training.models.wan.spec import cache_bindings
from longtake.training.models.wan.vae import CausalVAE, DecoderFirst, DecoderSteady

CPU = torch.device("cpu")
SMALL = replace(
    TINY,
    dit=DiTConfig(dim=128, ffn_dim=320, layers=2, heads=2, channels=16, text_dim=64, text_len=8),
    text=replace(TINY.text, dim=64, length=8),
    vae=replace(TINY.vae, res_blocks=2, dim_mult=(1, 2, 4, 4)),
    height=64,
    width=96,
)
CONV8 = REPOSITORY / "docs" / "recipes_library" / "wan2.2-ti2v-5b_fp8_conv8_sm90.yaml"
OPTIONS = BenchOptions(recipe="tiny_bf16_sm90", steps=2, chunks=2, warmup=0)


def small_options(monkeypatch: pytest.MonkeyPatch, preset: Preset = SMALL) -> BenchOptions:
    """Options whose preset is `preset`, for as long as the test runs."""
    monkeypatch.setitem(__import__("longtake.training.models.presets", fromlist=["PRESETS"]).PRESETS, "tiny", preset)
    return OPTIONS


# ---- random weights --------------------------------------------------------------------------------------------------


def test_a_random_weight_depends_on_its_name_alone() -> None:
    first, again, other = (weights.random_weight(n, (64, 32), CPU) for n in ("a.weight", "a.weight", "b.weight"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.bfloat16 and float(first.float().std()) == pytest.approx(32**-0.5, rel=0.05)
    assert torch.equal(weights.random_weight("x.norm_q.weight", (800,), CPU), torch.ones(800, dtype=torch.bfloat16))


def test_quantized_parts_are_what_the_exporter_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    from longtake.export.lower import packed_weight

    monkeypatch.setattr(weights, "CHUNK", 256)  # several pieces
    weight = weights.random_weight("blocks.0.ffn.0.weight", (48, 64), CPU)
    made = weights.nvfp4_parts("blocks.0.ffn.0.weight", weight)
    stored = packed_weight("w4a16", "blocks.0.ffn.0", weight, {})
    assert made.keys() == stored.keys()
    for name, tensor in stored.items():
        assert made[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    packed = Packed(made["blocks.0.ffn.0.weight.values"].view(torch.uint8),
                    made["blocks.0.ffn.0.weight.scales"].view(torch.float8_e4m3fn), weight.abs().amax().float(), "static_6")  # fmt: skip
    error = (dequantize(packed) - weight.float()).norm() / weight.float().norm()
    assert 0 < error < 0.15


def test_8_bit_parts_are_what_the_exporter_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    from longtake.export.lower_fp8 import packed_fp8_weight
    from longtake.plugins.nvfp4.reference import PLACEHOLDER_AMAX

    monkeypatch.setattr(weights, "CHUNK", 256)  # several pieces
    weight = weights.random_weight("blocks.0.ffn.0.weight", (48, 64), CPU)
    made, stored = weights.fp8_parts("a.weight", weight), packed_fp8_weight("a", weight, PLACEHOLDER_AMAX)
    assert torch.equal(made["a.weight.values"].view(torch.uint8), stored["a.weight.values"])
    torch.testing.assert_close(made["a.weight.scale"], stored["a.weight.scale"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", ["tiny_bf16_sm90", "tiny_w4a16_sm90"])
def test_an_exported_file_is_fed_by_name_and_like_pytorch(recipe: str) -> None:
    """Every constant that segments take as input, in the dtype and shape stored; plain ones equal PyTorch's."""
    from longtake.dtypes import BY_ONNX
    from longtake.formats.onnx_file import constants_of, read_onnx

    path = folder_of("skeleton", recipe_named(recipe)) / "onnx" / "dit.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is not exported")
    constants = constants_of(read_onnx(path, "small"))
    names = {name for name in constants if name.startswith("blocks.0.")}
    dit = random_dit(TINY, CPU).state_dict()
    seen = dict(weights.random_weights(path, CPU)(names))
    assert seen.keys() == names and any(name.endswith("ffn.0.bias") for name in names)
    for name, tensor in seen.items():
        assert tuple(tensor.shape) == tuple(constants[name].dims), name
        assert tensor.dtype == BY_ONNX[constants[name].data_type].torch, name
        if name in dit and tensor.dtype == torch.bfloat16:
            assert torch.equal(tensor, dit[name]), name


def test_a_filled_model_has_weights_by_name_and_finite_activations() -> None:
    dit = random_dit(SMALL, CPU)
    name = "blocks.1.ffn.2.weight"
    assert torch.equal(dit.state_dict()[name], weights.random_weight(name, (128, 320), CPU))
    frames = PlainDecoder(random_vae(SMALL, CPU, False)).decode(
        torch.randn(1, 16, 1, *SMALL.latent_hw), DecoderState(), first=True
    )
    assert frames.shape == (1, 3, 1, 64, 96) and bool(frames.isfinite().all()) and float(frames.std()) > 1e-3


# ---- PyTorch's side computes the same --------------------------------------------------------------------------------


def test_the_plain_dit_is_our_dit() -> None:
    """fp32, three chunks in view: what the slots hold and what dense attention over them gives."""
    preset = SMALL
    dit = random_dit(preset, CPU, torch.float32)
    plain = PlainDiT(dit)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(16, 8, *preset.latent_hw, generator=generator)
    sinusoid = timestep_sinusoid([500.0] * 8, preset.dit.freq_dim)
    cos, sin = rope_tables(preset.dit, [float(i) for i in range(8)], preset.grid_hw)
    context = dit.context(torch.randn(8, 64, generator=generator))
    cache = [tuple(torch.randn(4, preset.chunk_tokens, 2, 64, generator=generator) for _ in "kv") for _ in range(2)]
    old = [tuple(part.clone() for part in layer) for layer in cache]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = (torch.cat((old[layer][i][0], old[layer][i][2], fresh)) for i, fresh in ((0, k), (1, v)))
        scores = torch.einsum("thd,nhd->htn", q, keys) / math.sqrt(q.shape[-1])
        return torch.einsum("htn,nhd->thd", scores.softmax(-1), values)

    expected = dit(latents, sinusoid, (cos, sin), context, attend, cross=dense_cross_attention)
    got = plain(latents, sinusoid, cos, sin, context, cache, 3, 1)
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert all(
        torch.equal(cache[layer][i][s], old[layer][i][s]) for layer in range(2) for i in range(2) for s in (0, 2, 3)
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_plain_decoder_is_our_decoder(channels_last: bool) -> None:
    vae = fill(CausalVAE(SMALL.vae), CPU, torch.float32)
    plain = PlainDecoder(random_vae(SMALL, CPU, channels_last, torch.float32))
    latents = torch.randn(2, 1, 16, *SMALL.latent_hw, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        first, *caches = DecoderFirst(vae)(latents[0].unsqueeze(2))
        second = DecoderSteady(vae)(latents[1].unsqueeze(2), *caches)[0]
    state = DecoderState()
    for i, (expected, latent) in enumerate(zip((first, second), latents)):
        with torch.no_grad():
            got = plain.decode(latent.unsqueeze(2), state, first=i == 0)
        assert float((got - expected).norm() / expected.norm()) < 1e-5


# ---- roofline --------------------------------------------------------------------------------------------------------


def counted(run) -> float:  # type: ignore[no-untyped-def]
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("preset", [SMALL, TINY], ids=["small", "tiny"])
def test_dit_work_is_what_torch_counts(preset: Preset) -> None:
    with torch.device("meta"):
        dit = CausalDiT(preset.dit)
        tokens, shape = (
            preset.chunk_tokens,
            (preset.window_chunks, preset.chunk_tokens, preset.dit.heads, preset.dit.head_dim),
        )
        table = torch.empty(tokens, preset.dit.head_dim // 2)
        cache = [(torch.empty(shape), torch.empty(shape)) for _ in range(preset.dit.layers)]
        context = [torch.empty(2, preset.dit.text_len, preset.dit.heads, preset.dit.head_dim) for _ in cache]
        latents = torch.empty(preset.dit.channels, preset.chunk_latents, *preset.latent_hw)
        sinusoid = torch.empty(preset.chunk_latents, preset.dit.freq_dim)
        flops = counted(lambda: PlainDiT(dit)(latents, sinusoid, table, table, context, cache, preset.window_chunks, 0))
    assert dit_pass(preset).flops == pytest.approx(flops, rel=1e-9)


@pytest.mark.parametrize("preset", [SMALL, TINY, WAN22_TI2V_5B], ids=["small", "tiny", "5b"])
def test_vae_work_is_what_torch_counts(preset: Preset) -> None:
    with torch.device("meta"):
        vae = CausalVAE(preset.vae)
        latent = torch.empty(1, preset.vae.z_channels, 1, *preset.latent_hw)
        caches = DecoderFirst(vae)(latent)[1:]
        flops = counted(lambda: DecoderSteady(vae)(latent, *caches))
    assert vae_latent(preset).flops == pytest.approx(flops, rel=1e-9)


def test_vae_work_in_codes_is_what_torch_counts_of_folded_convolutions() -> None:
    """A product of 2x2 weights at every position that comes out, instead of one of 3x3."""
    levels = [(TINY.vae.decoder_dim * m, i) for i, m in enumerate(reversed(TINY.vae.dim_mult))][:3]
    frames, (height, width), fewer = 1, TINY.latent_hw, 0.0
    for (channels, i), timed in zip(levels, reversed(TINY.vae.temporal_down)):
        frames *= 2 if timed else 1
        fewer += 2.0 * channels**2 * 5 * frames * height * width * 4 ** (i + 1)
    plain, coded = (vae_latent(TINY, folded).convolution for folded in (False, True))
    assert plain - coded == pytest.approx(fewer, rel=1e-9)
    real = [vae_latent(WAN22_TI2V_5B, folded).convolution for folded in (False, True)]
    assert real[1] / real[0] == pytest.approx(61.1 / 66.1, abs=2e-3)
    recipe = recipe_named(str(CONV8))
    assert chunk_work(recipe, 4)["vae"].convolution == real[1] * recipe.model.chunk_latents


def test_the_real_model_needs_the_work_that_was_counted_before() -> None:
    """61 TFLOP of GEMM and 74 of attention a pass, 66.4 a latent in the VAE."""
    work = dit_pass(WAN22_TI2V_5B)
    assert work.gemm == pytest.approx(61.1e12, rel=0.01) and work.attention == pytest.approx(74.4e12, rel=0.01)
    assert vae_latent(WAN22_TI2V_5B).flops == pytest.approx(66.4e12, rel=0.01)
    assert chunk_work(recipe_named("wan2.2-ti2v-5b_bf16_sm90"), 4)["dit"].flops == pytest.approx(682e12, rel=0.01)


def test_the_floor_follows_the_recipe_and_needs_measured_rates() -> None:
    bf16, fp8 = (recipe_named(f"wan2.2-ti2v-5b_{kind}_sm90") for kind in ("bf16", "fp8"))
    slow = roofline(bf16, 4, "NVIDIA H100 80GB HBM3", {"dit_chunk": 2000.0})["dit"]
    fast = roofline(fp8, 4, "NVIDIA H100 80GB HBM3", {})["dit"]
    assert slow["floor_ms"] > fast["floor_ms"] and fast["share"] is None
    assert slow["share"] == pytest.approx(slow["floor_ms"] / 2000, abs=1e-4)
    assert roofline(bf16, 4, "NVIDIA RTX 6000", {"dit_chunk": 1.0})["dit"]["floor_ms"] is None


# ---- report ----------------------------------------------------------------------------------------------------------

SIDES = {
    "engine": {"fps": {"dit": 30.0, "vae": 28.0, "end_to_end": 15.0, "serial": 14.0}, "stage_ms": {"dit_chunk": 1066.0},
               "backend": "segmented", "peak_gb": 19.0, "machine": {"gpu": "NVIDIA H100 80GB HBM3"}},
    "torch": {"fps": {"dit": 20.0, "serial": 10.0}, "stage_ms": {}, "machine": {}},
    "torch_vae": {"fps": {"vae": 20.0, "vae_best": 24.0}, "stage_ms": {}},
    "torch_compile": {"error": "stopped after 240 s", "fps": {}},
}  # fmt: skip


def test_ratios_are_ours_over_theirs_and_only_of_what_was_measured() -> None:
    found = ratios(SIDES)
    assert found["dit_vs_eager"] == 1.5 and found["vae_vs_eager"] == 1.4
    assert found["end_to_end_vs_serial_eager"] == 1.5 and found["vae_vs_best_eager"] == pytest.approx(28 / 24, abs=1e-4)
    assert "dit_vs_compiled" not in found


def test_the_report_has_what_makes_a_figure_honest(tmp_path: Path) -> None:
    report = report_of(BenchOptions(recipe="wan2.2-ti2v-5b_fp8_sm90"), SIDES)
    wanted = ("kind", "command", "commit", "date", "preset", "recipe", "backend", "gpu", "versions", "resolution", "steps",
              "chunk_latents", "window_latents", "fps", "first_chunk_s", "stage_ms", "peak_gb", "against", "ratio")  # fmt: skip
    assert not [key for key in wanted if key not in report]
    assert report["kind"] == "bench" and report["resolution"] == "1280x704" and report["weights"] == "random"
    text = table(report)
    assert "stopped after 240 s" in text and "1.500x" in text and "TFLOP" in text
    assert write_plot(report, tmp_path / "bench.png").stat().st_size > 10_000
    json.dumps(report)


def test_several_gpus_stand_beside_one_with_the_share_of_their_exchanges(tmp_path: Path) -> None:
    ranks = {
        "fps": {"dit": 81.0, "vae": None, "serial": 30.0},
        "gpus": 2,
        "backend": "sharded",
        "machine": {"gpu": "X"},
    }
    steps = {"segments": 40.0, "sink_attention_nvfp4": 55.0, "gather_tokens": 3.0, "gather_heads": 2.0, "sum": 100.0}
    ranks["communication"] = communication(steps)
    assert ranks["communication"]["ms"] == 5.0 and ranks["communication"]["share"] == 0.05 and communication({}) == {}
    options = BenchOptions(recipe="wan2.2-ti2v-5b_fp8_sm90", gpus=2)
    report = report_of(options, {**SIDES, "ranks": ranks})
    one = SIDES["engine"]["fps"]
    assert report["gpus"] == 2 and report["ratio"]["dit_ranks_vs_one"] == pytest.approx(81 / one["dit"], abs=1e-4)
    assert "vae_ranks_vs_one" not in report["ratio"]
    assert "a clean pass on 2 GPUs" in table(report) and "'share': 0.05" in table(report)
    write_plot(report, tmp_path / "bench.png")
    assert options.parts() == ("engine", "ranks") and options_from_json(options.as_json()) == options


@pytest.mark.slow
def test_ranks_on_a_cpu_yield_every_figure() -> None:
    """Processes over gloo, in PyTorch: to try it out."""
    options = BenchOptions(
        recipe="tiny_w4a16_sm90", gpus=2, device="cpu", steps=1, chunks=1, quick=True, networks=("dit",)
    )
    saved: list[dict] = []
    figures = measure_ranks(options, saved.append)
    assert figures["backend"] == "sharded" and "2 ranks over gloo" in figures["reason"]
    assert figures["fps"]["dit"] > 0 and figures["first_chunk_s"] > 0
    assert saved[0]["budget"]["terms"] and saved[1]["gpus"] == 2 and saved[-1]["communication"] == {}


def test_options_survive_the_way_to_another_process() -> None:
    assert options_from_json(json.loads(json.dumps(OPTIONS.as_json()))) == OPTIONS
    assert BenchOptions(recipe="tiny_bf16_sm90", against="torch").parts() == (
        "engine",
        "torch",
        "torch_vae",
        "torch_compile",
    )


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_a_session_over_plain_torch_yields_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    options = small_options(monkeypatch)
    dit, vae = PlainDiT(random_dit(SMALL, CPU)), random_vae(SMALL, CPU, False)
    backend = PlainTorchBackend(options.the_recipe, "torch", dit, vae, CPU)
    saved: list[dict] = []
    figures = measure(backend, options, saved.append)
    assert set(figures["fps"]) == {"dit", "vae", "serial", "end_to_end"} and min(figures["fps"].values()) > 0
    assert {"denoise_pass", "clean_pass", "latent", "dit_chunk", "vae_chunk"} <= figures["stage_ms"].keys()
    assert len(saved) >= 3 and figures["first_chunk_s"] > 0


def test_bad_options_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--recipe", "tiny_bf16_sm90", "--networks", "dit,unet"]) == 2
    assert "bad --networks" in capsys.readouterr().err
    assert main(["bench", "--recipe", "tiny_bf16_sm9"]) == 2
    assert "did you mean 'tiny_bf16_sm90'" in capsys.readouterr().err
    assert main(["bench", "--recipe", "tiny_bf16_sm90", "--gpus", "3"]) == 2
    assert "3 GPUs cannot share the heads of tiny evenly" in capsys.readouterr().err
    assert main(["bench", "--recipe", "tiny_bf16_sm90", "--gpus", "2", "--decode-device", "cuda:1"]) == 2
    assert "two ways to use a second GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_a_report_marked_as_a_cpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--recipe", "tiny_w4a16_sm90", "--quick", "--steps", "1", "--out", str(tmp_path / "out")]
    words += ["--onnx", str(tmp_path / "onnx")]  # exported on the way
    assert main(words) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert report["backend"] == "reference" and report["product_figures"] is False and report["fps"]["end_to_end"] > 0
    assert (tmp_path / "out" / "bench.png").is_file() and "CPU timings" in capsys.readouterr().out


@pytest.mark.slow
def test_a_skeleton_with_random_weights_computes_what_plain_pytorch_does(tmp_path: Path) -> None:
    """Names alone bring both sides to the same velocity: ONNX Runtime over the filled graph, and the plain DiT."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from longtake.export.ort_view import ort_view

    assert main(["export", "--recipe", "tiny_bf16_sm90", "--skeleton", "--out", str(tmp_path)]) == 0
    path = tmp_path / "tiny_bf16" / "dit.onnx"
    assert not path.with_name("dit.onnx.data").exists()
    graph = onnx.load(str(path), load_external_data=False)
    waiting = {t.name: t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    for name, value in weights.random_weights(path, CPU)(set(waiting)):
        waiting[name].data_location = onnx.TensorProto.DEFAULT
        del waiting[name].external_data[:]
        waiting[name].raw_data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    generator, frames = torch.Generator().manual_seed(3), [float(i) for i in range(8)]
    dit, layers = random_dit(TINY, CPU, torch.float32), range(TINY.dit.layers)
    with torch.no_grad():
        context = dit.context(torch.randn(32, 128, generator=generator))
    latents = torch.randn(1, 16, 8, *TINY.latent_hw, generator=generator)
    sinusoid = timestep_sinusoid([500.0] * 8, TINY.dit.freq_dim)
    cos, sin = rope_tables(TINY.dit, frames, TINY.grid_hw)
    none = torch.tensor([-1], dtype=torch.int32)
    feeds = {"latents": latents, "timestep_sinusoid": sinusoid, "rope_cos": cos, "rope_sin": sin, "table": none}
    feeds |= {"write_slot": none} | {f"context_{i}": context[i] for i in layers}
    feeds |= {b.name: torch.zeros([int(n) for n in b.shape]) for i in layers for b in cache_bindings(TINY, "bf16", i)}
    session = onnxruntime.InferenceSession(ort_view(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    read = {i.name for i in session.get_inputs()}
    (got,) = session.run(["velocity"], {name: t.numpy() for name, t in feeds.items() if name in read})
    cache = [tuple(torch.zeros(4, TINY.chunk_tokens, 4, 64) for _ in "kv") for _ in layers]
    with torch.no_grad():
        expected = PlainDiT(dit)(latents[0], sinusoid, cos, sin, context, cache, 1, 0)
    assert float((torch.from_numpy(got)[0] - expected).norm() / expected.norm()) < 1e-5


@on_engines
@pytest.mark.slow
def test_the_whole_benchmark_runs_on_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the recipe is for compute capability 9.0")
    words = ["bench", "--recipe", "tiny_bf16_sm90", "--quick", "--against", "torch", "--out", str(tmp_path / "out")]
    words += ["--seconds", "1500"]  # of which export and build take minutes beside other work
    assert main([*words, "--onnx", str(tmp_path / "onnx"), "--engines", str(tmp_path / "engines")]) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert report["backend"] == "segmented" and report["product_figures"] and report["peak_gb"] > 0.3
    assert {"dit_vs_eager", "dit_vs_compiled", "vae_vs_eager", "end_to_end_vs_serial_eager"} <= report["ratio"].keys()
    assert report["agreement"]["torch"] < 0.2 and report["engine"]["dit_pass_ms"]["segments"] > 0


@pytest.mark.gpu
def test_random_weights_are_the_same_twice_on_the_device() -> None:
    made = [weights.random_weight("a.weight", (256, 128), torch.device("cuda")) for _ in range(2)]
    assert made[0].is_cuda and torch.equal(made[0], made[1])


@pytest.mark.gpu
def test_the_compiled_dit_agrees_with_the_eager_one() -> None:
    preset, device = SMALL, torch.device("cuda")
    dit = random_dit(preset, device)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(16, 8, *preset.latent_hw, generator=generator).to(device)
    sinusoid = timestep_sinusoid([500.0] * 8, preset.dit.freq_dim).to(device)
    cos, sin = (t.to(device) for t in rope_tables(preset.dit, [float(i) for i in range(8)], preset.grid_hw))
    with torch.no_grad():
        context = dit.context(torch.randn(8, 64, generator=generator).to(device))
        out = []
        for compile in (None, {"mode": "default"}):
            shape = (4, preset.chunk_tokens, 2, 64)
            cache = [tuple(torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in "kv") for _ in range(2)]
            out.append(PlainDiT(dit, compile)(latents, sinusoid, cos, sin, context, cache, 1, 0))
    assert float((out[0] - out[1]).norm() / out[0].norm()) < 0.02


def test_a_family_is_not_measured_against_what_there_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longtake.runtime.bench.options.PLAIN", ("wan",))
    words = ["bench", "--recipe", "world-tiny_bf16_sm90", "--against", "torch", "--out", str(tmp_path / "out")]
    assert main(words) == LongtakeError.exit_code
    said = capsys.readouterr().err
    assert "no plain PyTorch of this model" in said and "world-tiny" in said and "leave --against out" in said
    assert not (tmp_path / "out").exists()
    assert roofline(recipe_named("world-tiny_bf16_sm90"), 4, "NVIDIA H200", {}) == {}


def test_the_report_says_what_convolutions_ran_in_on_both_sides(tmp_path: Path) -> None:
    """By a recipe's file, as the command takes it."""
    sides = {name: dict(side) for name, side in SIDES.items()}
    sides["engine"]["vae_conv"] = {"bf16": 7, "fp8": 18, "int8": 15}
    sides["torch"]["vae_conv"] = {"bf16": 42}
    report = report_of(BenchOptions(recipe=str(CONV8), against="torch"), sides)
    assert report["vae_conv"] == {"bf16": 7, "fp8": 18, "int8": 15}
    told = "convolutions of the VAE: longtake segmented 7 in bf16, 18 in fp8, 15 in int8; torch 42 in bf16"
    assert told in table(report)
    slow, fast = (
        report_of(BenchOptions(recipe=r), sides)["roofline"]["vae"]["floor_ms"]
        for r in ("wan2.2-ti2v-5b_fp8_sm90", str(CONV8))
    )
    assert fast < 0.6 * slow  # the floor of 8-bit convolutions is another one


@pytest.mark.parametrize("part", ["torch", "torch_vae"])
def test_pytorch_stands_beside_convolutions_in_codes(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """PyTorch's side of a recipe that is named by its file: the same networks in bf16, session and decoder alone."""
    small_options(monkeypatch)
    tiny = str(CONV8).replace("wan2.2-ti2v-5b", "tiny")
    options = BenchOptions(recipe=tiny, steps=1, quick=True, device="cpu", against="torch")
    assert options.the_recipe.vae_conv == "calibrated" and options.parts() == (
        "engine",
        "torch",
        "torch_vae",
        "torch_compile",
    )
    monkeypatch.setattr(torch_side, "fastest_attention", lambda preset, device: ("cudnn", {"cudnn": 1.0}))
    figures = torch_side.measure_torch(part, options, lambda figures: None)
    assert set(figures["vae_conv"]) == {"bf16"} and figures["vae_conv"]["bf16"] > 25 and figures["fps"]["vae"] > 0


def test_the_reference_counts_the_convolutions_of_its_graph(tmp_path: Path) -> None:
    names = ("conv_3x3x3_fp8", "conv_3x3x3_int8", "conv_3x3x3_int8", "conv_1x1x1", "qk_norm_rope", "Add")
    nodes = [onnx.helper.make_node(n, ["x"], ["y"], domain="" if n == "Add" else DOMAIN) for n in names]
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [out])), str(tmp_path / "vae_steady.onnx"))
    backend = ReferenceBackend.__new__(ReferenceBackend)  # whose files are verified elsewhere
    backend.recipe, backend._views = recipe_named(str(CONV8)), {"vae_steady": tmp_path / "vae_steady.ort.onnx"}
    assert conv_counts(backend) == {"bf16": 1, "fp8": 1, "int8": 2}
    backend = ReferenceBackend.__new__(ReferenceBackend)
    backend.recipe = recipe_named("tiny_bf16_sm90")  # its decoder is no ops
    assert conv_counts(backend) == {}


@pytest.mark.parametrize("option", ["--device", "--decode-device"])
def test_a_device_that_is_none_is_refused_before_anything_is_exported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    def prepared(options: object) -> None:
        raise AssertionError("it was made ready")

    monkeypatch.setattr("longtake.commands.bench.prepare", prepared)
    assert main(["bench", "--recipe", "tiny_bf16_sm90", option, "banana"]) == 2
    said = capsys.readouterr().err
    assert "unknown device" in said and f"leave out {option}" in said
