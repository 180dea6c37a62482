"""Our FP8 attention for Hopper: the kernels' text on the CPU, with the tensor cores' products played by host code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.cache_format import CACHE_FORMATS
from longtake.plugins.cases import op_inputs
from longtake.plugins.nvrtc import compile_cubin
from longtake.plugins.registry import op_named
from longtake.plugins.shapes import dims_from_shapes
from longtake.plugins.sink_attention.hopper import HopperSinkAttention, attend_kernel, tile_kernel
from longtake.plugins.sink_attention.reference import attention_fp8, dequantize_kv

CASES = (  # a tile and no more; tiles over two blocks of the cache, the last one cut; queries in two thread blocks
    ({"S": 2, "L": 128, "H": 2, "D": 128}, (1,)),
    ({"S": 4, "L": 40, "H": 3, "D": 128}, (3, -1, 0, 2)),
    ({"S": 4, "L": 200, "H": 1, "D": 128}, (2, 0, -1)),
    ({"S": 3, "L": 136, "H": 2, "D": 64}, (-1, 2)),
    ({"S": 4, "L": 33, "H": 1, "D": 64}, (0,)),
)


def run(
    fmt: str, dims: dict[str, int], table: tuple[int, ...], change: Any = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    op = f"sink_attention_{fmt}"
    inputs = op_inputs(op, dims, "bf16", table, len(table))
    if change:
        change(*inputs)
    launcher = HopperSinkAttention(
        op_named(op), dims_from_shapes(op_named(op).spec, [t.shape for t in inputs]), arch="sm_90a"
    )
    memory = torch.full((launcher.workspace_bytes + 256,), 0x7F, dtype=torch.uint8)
    out = torch.full_like(inputs[0], float("nan"))
    workspace = -(-memory.data_ptr() // 256) * 256
    launcher.launch([t.data_ptr() for t in (*inputs, out)], 0, workspace, len(table))
    return inputs, out.float()


def window_of(fmt: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in fp32 [H, rows, D]."""
    q, k, v, *cache, table = inputs
    slots = dequantize_kv(*cache) if fmt == "nvfp4" else cache[0].float()
    fresh = torch.stack((k, v)).float()
    k, v = (torch.cat([(slots[i] if i >= 0 else fresh)[pane] for i in table.tolist()]) for pane in (0, 1))
    return tuple(x.float().transpose(0, 1) for x in (q, k, v))


def louder(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> None:
    """Give the fresh block the largest magnitudes."""
    k.mul_(1.37), v.mul_(1.37)


def largest(fmt: str, inputs: tuple[Tensor, ...]) -> list[float]:
    """Largest magnitudes of queries, keys and values: of a cached block the one that was stored with it."""
    q, k, v, *cache, table = inputs
    found = [float(q.float().abs().max())]
    for pane, fresh in enumerate((k, v)):
        own = cache[2][:, pane] if fmt == "nvfp4" else cache[0][:, pane].float().abs().amax((1, 2, 3))
        found.append(max(float(own[i] if i >= 0 else fresh.float().abs().max()) for i in table.tolist()))
    return found


def in_e4m3(fmt: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """Attention [L, H, D] in the kernel's arithmetic, sums exact."""
    window = (x[None] for x in window_of(fmt, inputs))
    return attention_fp8(*window, largest=largest(fmt, inputs))[0].transpose(0, 1)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("fmt", CACHE_FORMATS)
def test_every_bit_is_where_it_belongs(host_device: Any, fmt: str, reverse: bool) -> None:
    host_device.reverse = reverse
    for dims, table in CASES:
        inputs, out = run(fmt, dims, table, louder if -1 in table else None)
        q, k, v = window_of(fmt, inputs)
        wanted = in_e4m3(fmt, inputs)
        exact = (torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1) @ v).transpose(0, 1)
        # Probabilities near the edge between two codes go either way, and the output is rounded to bf16. Where a cached
        # block has the largest magnitude, many of its values lie on such an edge as well.
        limit = 8e-3 if -1 in table or fmt == "bf16" else 0.08
        assert (out - wanted).norm() <= limit * wanted.norm(), (dims, table)
        assert (out - exact).norm() <= 0.08 * exact.norm(), (dims, table)


class Kept:
    """A launcher with a workspace that nobody else writes."""

    def __init__(self, fmt: str, dims: dict[str, int]) -> None:
        self.launcher = HopperSinkAttention(op_named(f"sink_attention_{fmt}"), dims, arch="sm_90a")
        self.memory = torch.zeros(self.launcher.workspace_bytes + 256, dtype=torch.uint8)
        self.version = torch.zeros(1, dtype=torch.int32)

    def run(self, inputs: tuple[Tensor, ...], version: int) -> Tensor:
        out = torch.full_like(inputs[0], float("nan"))
        self.version.fill_(version)
        pointers, workspace = [t.data_ptr() for t in (*inputs, out)], -(-self.memory.data_ptr() // 256) * 256
        self.launcher.launch_kept(self.version.data_ptr(), pointers, 0, workspace, inputs[-1].numel())
        return out


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("fmt, tokens", (("nvfp4", 128), ("nvfp4", 200), ("bf16", 200)))
def test_a_kept_window_is_what_a_new_one_would_be(host_device: Any, fmt: str, tokens: int, reverse: bool) -> None:
    """Bit for bit, pass after pass with other queries and another fresh block; slots are read when the version changes, or a
    louder block changes the scales, and at no other time."""
    host_device.reverse = reverse
    dims, table = {"S": 4, "L": tokens, "H": 1, "D": 128}, (2, 0, -1)
    first = op_inputs(f"sink_attention_{fmt}", dims, "bf16", table, 3)
    for tensor in first[1:3]:
        tensor.mul_(0.3)  # the fresh block: slots have the largest
    cache, kept = first[3:-1], Kept(fmt, dims)
    wanted = kept.run(first, 1)
    exact = window_of(fmt, first)
    q, k, v = exact
    truth = (torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1) @ v).transpose(0, 1)
    assert (wanted.float() - truth).norm() <= 0.08 * truth.norm()
    fresh = [t.flip(0).contiguous() for t in first[:3]]
    following = (*fresh, *cache, first[-1])
    anew = Kept(fmt, dims).run(following, 1)
    silent = (*fresh, *(torch.zeros_like(t) if t.dtype != torch.float32 else t for t in cache), first[-1])
    if (
        tokens == 128
    ):  # no tile is of a slot and the fresh block; and a slot's amax, of which the scale is made, is still read
        assert torch.equal(kept.run(silent, 1), anew)
    assert torch.equal(kept.run(following, 1), anew)
    loud = (fresh[0], fresh[1] * 40, fresh[2] * 40, *cache, first[-1])
    assert torch.equal(kept.run(loud, 1), Kept(fmt, dims).run(loud, 9))
    changed = (*fresh, *(t.roll(1, 0).contiguous() for t in cache), first[-1])
    assert torch.equal(kept.run(changed, 2), Kept(fmt, dims).run(changed, 1))
    assert not torch.equal(kept.run(changed, 2), anew)


def test_ones_stay_ones(host_device: Any) -> None:
    def change(*inputs: Tensor) -> None:
        for tensor in inputs[:4]:
            tensor.fill_(1.0)

    _, out = run("bf16", {"S": 3, "L": 200, "H": 1, "D": 128}, (0, 1, -1), change)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("size", (1e-37, 1e-20, 1e-12))
def test_tiny_magnitudes_give_numbers(host_device: Any, size: float) -> None:
    def change(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor) -> None:
        q.mul_(size), k.mul_(size), v.mul_(size), cache.mul_(size)

    _, out = run("bf16", {"S": 2, "L": 136, "H": 1, "D": 64}, (1, -1), change)
    assert out.isfinite().all() and (out.abs() <= 8 * size).all()
    assert (size < 1e-15) == bool((out == 0).all())


def test_an_unaligned_workspace_is_refused(host_device: Any) -> None:
    dims = {"S": 2, "L": 16, "H": 1, "D": 64}
    with pytest.raises(LongtakeError, match="not aligned"):
        HopperSinkAttention(op_named("sink_attention_bf16"), dims, arch="sm_90a").launch([16] * 6, 0, 0x1080, 1)


def test_scores_far_apart(host_device: Any) -> None:
    """A later tile outweighs the ones before it, and a row whose best key comes first keeps it."""

    def change(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor) -> None:
        cache[0, 0, -1] = q[3] * 4
        cache[1, 0, 0] = q[5] * 4

    dims = {"S": 2, "L": 136, "H": 1, "D": 64}
    inputs, out = run("bf16", dims, (1, 0), change)
    wanted = in_e4m3("bf16", inputs)
    assert (out - wanted).norm() <= 8e-3 * wanted.norm()


def test_other_heads_are_refused() -> None:
    with pytest.raises(LongtakeError, match="no FP8 kernel") as raised:
        HopperSinkAttention(op_named("sink_attention_nvfp4"), {"S": 2, "L": 16, "H": 1, "D": 48})
    assert "heads of 48" in str(raised.value) and "heads of 64 or 128" in str(raised.value)


@pytest.mark.parametrize("dim", (64, 128))
def test_compiles(dim: int) -> None:
    for kernel in (tile_kernel("nvfp4"), tile_kernel("bf16"), attend_kernel()):
        cubin = compile_cubin(kernel.source, {**kernel.macros({"D": dim}), "COMPUTE_BF16": 1}, "sm_90a")
        assert cubin[:4] == b"\x7fELF"


def test_the_reference_s_own_scales_are_the_largest_magnitudes() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, rows, 64, generator=generator) * size for rows, size in ((8, 1.0), (300, 1.0), (300, 9.0))
    )
    q[1] *= 5  # a batch entry's scale is its own
    got = attention_fp8(q, k, v)
    for entry in range(2):
        own = [x[entry : entry + 1] for x in (q, k, v)]
        told = attention_fp8(*own, largest=[float(x.abs().max()) for x in own])
        torch.testing.assert_close(got[entry : entry + 1], told, rtol=1e-5, atol=1e-5)
    exact = torch.softmax(q @ k.mT / 8, -1) @ v
    error = (got - exact)[0].norm() / exact[0].norm()
    assert 0.01 < error < 0.08
