"""The kernels that lay a window out for a library's attention, run on the CPU from their own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.machine.capability import attention_methods
from longtake.plugins.cache_format import CACHE_FORMATS, SIZES
from longtake.plugins.cases import op_inputs
from longtake.plugins.nvrtc import ARCHITECTURES, compile_cubin
from longtake.plugins.registry import op_named
from longtake.plugins.shapes import dims_from_shapes
from longtake.plugins.sink_attention import hopper, window
from longtake.plugins.sink_attention.reference import dequantize_kv
from longtake.plugins.sink_attention.window import WindowedAttention, addresses, window_kernel
from longtake.training.models.presets import WAN22_TI2V_5B as WAN  # the sizes that a workspace is promised for

LARGE = {"S": 2, "L": 40, "H": 4, "D": 128}  # several thread blocks, the last one not full
TABLES = ((-1,), (3, 0), (2, -1, 1), (0, 1, 2, 3))


class Recorded(WindowedAttention):
    """Attention that keeps what it was given."""

    def attend(self, pointers: Any, stream: int, workspace: int, table_len: int) -> None:
        d, found = self.dims, addresses(self.dims, workspace)[0]
        shape = (table_len * d["L"], d["H"], d["D"])
        self.k, self.v = (self.at(found[name], shape) for name in ("window_k", "window_v"))

    def at(self, address: int, shape: tuple[int, ...]) -> Tensor:
        start, size = address - self.memory.data_ptr(), 2 * shape[0] * shape[1] * shape[2]
        return self.memory[start : start + size].view(torch.bfloat16).view(shape).clone()


def run(fmt: str, dims: dict[str, int], table: tuple[int, ...], seed: int = 0) -> tuple[Any, ...]:
    op = f"sink_attention_{fmt}"
    inputs = op_inputs(op, dims, "bf16", table, seed)
    launcher = Recorded(op_named(op), dims_from_shapes(op_named(op).spec, [t.shape for t in inputs]), arch="sm_90a")
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
            found, inputs, _ = run(fmt, dims, table, seed)
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
        launcher = Recorded(op_named(op), dims, arch="sm_90a")
        launcher.memory = torch.zeros(launcher.workspace_bytes + 256, dtype=torch.uint8)
        out = torch.empty_like(q)
        launcher.tensors = (*inputs, out)
        launcher.launch([t.data_ptr() for t in (*inputs, out)], 0, launcher.memory.data_ptr(), 1)
        for got, wanted in zip((launcher.k, launcher.v), window_of("nvfp4", inputs)):
            assert torch.equal(got, wanted.to(torch.bfloat16)), largest


def test_buffers_are_aligned_and_apart() -> None:
    dims = {"S": 4, "L": 33, "H": 3, "D": 48, "W": 4}
    for layout in (window, hopper):
        found, end = layout.addresses(dims, 1 << 20)
        places = [*found.values(), end]
        assert all(place % 256 == 0 for place in places) and places == sorted(set(places))


def test_workspace_of_the_large_model() -> None:
    dims = {"S": WAN.window_chunks, "L": WAN.chunk_tokens, "H": WAN.dit.heads, "D": WAN.dit.head_dim}
    assert WindowedAttention(op_named("sink_attention_nvfp4"), dims).workspace_bytes == 4 * 28160 * 3072
    assert hopper.HopperSinkAttention(op_named("sink_attention_nvfp4"), dims).workspace_bytes < 2.8 * 28160 * 3072


def test_methods_end_with_the_one_that_always_works() -> None:
    assert attention_methods("9.0", "fp8", 128)[0] == ("wgmma", "fp8")
    assert attention_methods("9.0", "fp8", 128)[1:] == attention_methods("9.0", "bf16", 128)
    assert attention_methods("9.0", "bf16", 128)[:2] == [("cudnn", "bf16"), ("torch", "bf16")]
    assert attention_methods("7.5", "fp8", 48) == [("portable", "bf16")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(arch: str) -> None:
    for fmt in CACHE_FORMATS:
        kernel = window_kernel(fmt)
        assert compile_cubin(kernel.source, {**kernel.macros({}), "COMPUTE_BF16": 1}, arch)[:4] == b"\x7fELF"
