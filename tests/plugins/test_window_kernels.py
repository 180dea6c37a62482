"""The kernels that lay a window out for a library's attention, run on the CPU from their own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.plugins.capability import attention_methods
from longtake.plugins.cases import SIZES, op_inputs
from longtake.plugins.kernels import dims_from_shapes
from longtake.plugins.nvrtc import ARCHITECTURES, compile_cubin
from longtake.plugins.sink_attention import window
from longtake.plugins.sink_attention.library import WindowedAttention
from longtake.plugins.sink_attention.reference import dequantize_kv
from longtake.plugins.sink_attention.trial import UNEVEN, trials
from longtake.plugins.sink_attention.window import FACTOR_BYTES, FACTORS, addresses, elements, parts, window_kernels
from longtake.plugins.spec import CACHE_FORMATS, OPS
from longtake.training.presets import WAN22_TI2V_5B as WAN  # the sizes that a workspace is promised for

LARGE = {"S": 2, "L": 40, "H": 4, "D": 128}  # several thread blocks, the last one not full
TABLES = ((-1,), (3, 0), (2, -1, 1), (0, 1, 2, 3))


class Recorded(WindowedAttention):
    """Attention that keeps what it was given and answers with the queries."""

    def attend(self, pointers: Any, workspace: int, table_len: int, stream: int) -> None:
        d = self.dims
        block, window = (d["L"], d["H"], d["D"]), (table_len * d["L"], d["H"], d["D"])
        self.fp8 = self.attention == "fp8"
        self.k, self.v = (self.at(pointers[name], window) for name in ("k", "v"))
        self.q = self.at(pointers["q"], block)
        if self.fp8:
            self.factors = {n: self.view(pointers[n], 1, torch.float32).item() for n in FACTORS}
        for part in range(len(parts(d["L"], table_len)) if self.fp8 else 1):  # queries, less in every part
            self.view(pointers["out"] + part * elements(d), elements(d), self.q.dtype).copy_(
                (self.q.float() / 2**part).to(self.q.dtype).flatten() if part else self.q.flatten()
            )
            if self.fp8:
                logs = self.view(pointers["stats"] + 4 * part * d["L"] * d["H"], d["L"] * d["H"], torch.float32)
                logs.copy_(torch.randn(logs.shape, generator=torch.Generator().manual_seed(part)) * 3 + 80)

    def view(self, address: int, count: int, dtype: torch.dtype) -> Tensor:
        start = address - self.memory.data_ptr()
        if 0 <= start < self.memory.nbytes:
            return self.memory[start : start + count * dtype.itemsize].view(dtype)
        return next(t for t in self.tensors if t.data_ptr() == address).flatten()

    def at(self, address: int, shape: tuple[int, ...]) -> Tensor:
        dtype = torch.float8_e4m3fn if self.fp8 else torch.bfloat16
        return self.view(address, shape[0] * shape[1] * shape[2], dtype).view(shape).clone()


def run(fmt: str, attention: str, dims: dict[str, int], table: tuple[int, ...], seed: int = 0) -> tuple[Any, ...]:
    op = f"sink_attention_{fmt}"
    inputs = op_inputs(op, dims, "bf16", table, seed)
    launcher = Recorded(op, dims_from_shapes(OPS[op], [t.shape for t in inputs]), attention, arch="sm_90a")
    launcher.memory = torch.full((launcher.workspace_bytes + 256,), 0x7F, dtype=torch.uint8)
    out = torch.full_like(inputs[0], float("nan"))
    launcher.tensors = (*inputs, out)
    launcher.launch([t.data_ptr() for t in (*inputs, out)], 0, launcher.memory.data_ptr(), len(table))
    return launcher, inputs, out


def window_of(fmt: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The window in fp32 [W*L, H, D], K and V."""
    _, k, v, *cache, table = inputs
    slots = dequantize_kv(*cache) if fmt == "nvfp4" else cache[0].float()
    fresh = torch.stack((k, v)).float()
    return tuple(torch.cat([(slots[i] if i >= 0 else fresh)[pane] for i in table.tolist()]) for pane in (0, 1))


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("fmt", CACHE_FORMATS)
def test_bf16_window_is_the_codec_to_the_last_bit(host_device: Any, fmt: str, reverse: bool) -> None:
    host_device.reverse = reverse
    for dims in (SIZES[2], LARGE):
        for seed, table in enumerate(t for t in TABLES if max(t) < dims["S"] and len(t) <= dims["S"]):
            found, inputs, _ = run(fmt, "bf16", dims, table, seed)
            for got, wanted in zip((found.k, found.v), window_of(fmt, inputs)):
                assert torch.equal(got, wanted.to(torch.bfloat16)), table


def test_bf16_window_of_every_code_scale_and_magnitude(host_device: Any) -> None:
    op, dims = "sink_attention_nvfp4", {"S": 1, "L": 127, "H": 1, "D": 128}
    q, k, v, values, scales, amax, table = op_inputs(op, dims, "bf16", (0,))
    codes = torch.arange(16)
    values[:] = (codes[0::2] | codes[1::2] << 4).to(torch.uint8).view(torch.int8).repeat(8)
    scales[:] = torch.arange(127, dtype=torch.int8)[:, None, None]  # every finite E4M3 scale
    for largest in (0.0, 1e-20, 3e-5, 1.0, 117.0, 1e20):
        amax.fill_(largest)
        inputs = (q, k, v, values, scales, amax, table)
        launcher = Recorded(op, dims, "bf16", arch="sm_90a")
        launcher.memory = torch.zeros(launcher.workspace_bytes + 256, dtype=torch.uint8)
        out = torch.empty_like(q)
        launcher.tensors = (*inputs, out)
        launcher.launch([t.data_ptr() for t in (*inputs, out)], 0, launcher.memory.data_ptr(), 1)
        for got, wanted in zip((launcher.k, launcher.v), window_of("nvfp4", inputs)):
            assert torch.equal(got, wanted.to(torch.bfloat16)), largest


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("fmt", CACHE_FORMATS)
def test_fp8_window_and_queries(host_device: Any, fmt: str, reverse: bool) -> None:
    host_device.reverse = reverse
    for dims in (SIZES[2], LARGE):
        for seed, table in enumerate(t for t in TABLES if max(t) < dims["S"] and len(t) <= dims["S"]):
            found, inputs, out = run(fmt, "fp8", dims, table, seed)
            wanted_k, wanted_v = window_of(fmt, inputs)
            for name, got, wanted in (("k", found.k, wanted_k), ("v", found.v, wanted_v), ("q", found.q, inputs[0])):
                got, wanted = got.float() * found.factors[f"descale_{name}"], wanted.float()
                # E4M3 has 4 significant bits, and a tensor's smallest step is 2^-9 of its scale
                bound = wanted.abs() * 2**-4 * 1.01 + found.factors[f"descale_{name}"] * 2**-10
                assert ((got - wanted).abs() <= bound).all(), (name, table)
                assert got.abs().max() >= 0.9 * wanted.abs().max()
            assert found.factors["scale_s"] * found.factors["descale_s"] == pytest.approx(1)
            assert found.factors["scale_o"] * found.factors["descale_v"] == pytest.approx(1)
            wide = found.q.float() * found.factors["descale_v"]  # what "attention" answered, with the output's scale
            assert torch.equal(out, wide.to(torch.bfloat16))


@pytest.mark.parametrize("part_keys", (128, 80, 40, 33))
def test_parts_merge_by_their_log_sum_exp(host_device: Any, monkeypatch: pytest.MonkeyPatch, part_keys: int) -> None:
    monkeypatch.setattr(window, "PART_KEYS", part_keys)
    monkeypatch.setattr(window, "_TILE", 16)
    for dims in (LARGE | {"S": 4}, {"S": 3, "L": 37, "H": 3, "D": 48}):
        for entries in range(1, dims["S"] + 1):
            found, _, out = run("nvfp4", "fp8", dims, tuple(range(-1, entries - 1)))
            cut = parts(dims["L"], entries)
            assert sum(keys for _, keys in cut) == entries * dims["L"]
            assert all(keys <= part_keys for _, keys in cut)
            assert [first for first, _ in cut] == [sum(k for _, k in cut[:i]) for i in range(len(cut))]
            logs = [
                torch.randn(dims["L"] * dims["H"], generator=torch.Generator().manual_seed(part)) * 3 + 80
                for part in range(len(cut))
            ]
            weights = torch.stack(logs).softmax(0).view(len(cut), dims["H"], dims["L"]).transpose(1, 2)[..., None]
            answers = [(found.q.float() / 2**part).to(found.q.dtype).float() for part in range(len(cut))]
            wanted = (weights * torch.stack(answers)).sum(0) * found.factors["descale_v"]
            assert torch.allclose(out.float(), wanted, rtol=2**-8, atol=1e-6), (part_keys, entries)


def test_the_large_model_is_cut_into_two() -> None:
    assert parts(7040, 4) == ((0, 14080), (14080, 14080))
    assert parts(7040, 3) == ((0, 14080), (14080, 7040))
    assert parts(7040, 2) == ((0, 14080),)


@pytest.mark.parametrize("mistake", ("none", "base 2", "no scale"))
def test_a_trial_tells_conventions_apart(mistake: str) -> None:
    dims = {"S": 4, "L": 7040, "H": 1, "D": 64, "W": 4}
    places, end = addresses(dims, "fp8", 0)
    memory = torch.empty(end, dtype=torch.uint8)
    assert [trial.uneven for trial in trials(dims, 2)] == [False, False]
    wanted = trials(dims, 4)[-1].fill(memory, places, dims, 4)
    k, v = (
        memory[places[name] :][: 28160 * 64].view(torch.float8_e4m3fn).float().view(28160, 64)
        for name in ("window_k", "window_v")
    )
    scale = memory[places["factors"] :][:4].view(torch.float32) if mistake != "no scale" else 1.0
    scores = k.sum(1) * 64**-0.5 * scale  # the queries are ones
    logs = torch.stack([part.logsumexp(0) for part in scores.split(14080)])
    weights = (logs / 1.4427 if mistake == "base 2" else logs).softmax(0)
    got = float((weights * torch.stack([part[0, 0] for part in v.split(14080)])).sum())
    assert (abs(got - wanted) <= UNEVEN.tolerance) == (mistake == "none"), (got, wanted)


def test_buffers_are_aligned_and_apart() -> None:
    dims = {"S": 4, "L": 33, "H": 3, "D": 48, "W": 4}
    for attention in ("bf16", "fp8"):
        found, end = addresses(dims, attention, 1 << 20)
        places = [*found.values(), end]
        assert all(place % 256 == 0 for place in places) and places == sorted(set(places))
        if attention == "fp8":
            assert places[list(found).index("factors") + 1] - found["factors"] >= 10 * FACTOR_BYTES


def test_workspace_of_the_large_model() -> None:
    dims = {"S": WAN.window_chunks, "L": WAN.chunk_tokens, "H": WAN.dit.heads, "D": WAN.dit.head_dim}
    assert WindowedAttention("sink_attention_nvfp4", dims, "bf16").workspace_bytes == 4 * 28160 * 3072
    assert WindowedAttention("sink_attention_nvfp4", dims, "fp8").workspace_bytes < 2.8 * 28160 * 3072


def test_methods_end_with_the_one_that_always_works() -> None:
    assert attention_methods("9.0", "fp8", 128)[0] == ("wgmma", "fp8")
    assert attention_methods("9.0", "bf16", 128)[:2] == [("cudnn", "bf16"), ("torch", "bf16")]
    assert attention_methods("7.5", "fp8", 48) == [("portable", "bf16")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(arch: str) -> None:
    for fmt in CACHE_FORMATS:
        for attention in ("bf16", "fp8"):
            kernels = window_kernels(fmt, attention)
            assert compile_cubin(kernels.source, {**kernels.macros({}), "COMPUTE_BF16": 1}, arch)[:4] == b"\x7fELF"
