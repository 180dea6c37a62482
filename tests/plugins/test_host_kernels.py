"""The kernels' own text, run thread by thread on the CPU, against the references: no GPU needed.

Both thread orders are tried: a barrier that is missing shows in one of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.plugins.cache_format import CACHE_FORMATS, SIZES
from longtake.plugins.cases import op_inputs
from longtake.plugins.launch import Launcher
from longtake.plugins.nvfp4_dequantize.op import OPS as DEQUANTIZE
from longtake.plugins.registry import op_named

ODD = SIZES[2]  # more than one tile, none of them full


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("fmt", CACHE_FORMATS)
def test_write(host_device: Any, fmt: str, reverse: bool) -> None:
    host_device.reverse = reverse
    op = f"kv_cache_write_{fmt}"
    for seed, slot in enumerate((-1, 0, 3, 4)):
        inputs = op_inputs(op, ODD, "bf16", (slot,), seed)
        wanted = op_named(op).reference(*inputs)
        got = host_device.run(op, *inputs)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted if isinstance(wanted, tuple) else (wanted,)))


def test_ranks_write_the_codes_of_one_gpu(host_device: Any) -> None:
    """Two launches with the largest of all ranks put between them, each rank with half of the heads."""
    op, dims = op_named("kv_cache_write_nvfp4"), {"S": 2, "L": 70, "H": 4, "D": 32}
    k, v, *cache, slot = op_inputs(op.name, dims, "bf16", (1,), 5)
    k[:, 3] *= 9  # the largest is one rank's
    wanted = op.reference(k, v, *cache, slot)
    launchers = [Launcher(op, {**dims, "H": 2}) for _ in range(2)]
    spaces = [torch.zeros(launcher.workspace_bytes, dtype=torch.uint8) for launcher in launchers]
    parts = [
        [t.chunk(2, -2)[rank].contiguous() if t.dim() > 2 else t.clone() for t in (k, v, *cache)] for rank in (0, 1)
    ]
    addresses = [[t.data_ptr() for t in (*own, slot, *own[2:])] for own in parts]
    whole = [None, None]  # what each has found, as it is known once both have

    def first(rank: int) -> None:
        whole[rank] = spaces[rank].view(torch.float32).clone()
        raise InterruptedError

    for rank, launcher in enumerate(launchers):
        with pytest.raises(InterruptedError):
            launcher.launch_around(partial(first, rank), addresses[rank], 0, spaces[rank].data_ptr())
    largest = torch.maximum(*whole)
    for rank, launcher in enumerate(launchers):
        space = spaces[rank].view(torch.float32)
        launcher.launch_around(partial(space.copy_, largest), addresses[rank], 0, spaces[rank].data_ptr())
    values, scales = (torch.cat([own[i] for own in parts], -2) for i in (2, 3))
    assert torch.equal(values, wanted[0]) and torch.equal(scales, wanted[1])
    assert all(torch.equal(own[4], wanted[2]) for own in parts)


def test_many_writes_are_equal_to_the_last_bit(host_device: Any) -> None:
    op, dims = "kv_cache_write_nvfp4", {"S": 1, "L": 200, "H": 4, "D": 128}
    for seed, scale in enumerate((1.0, 0.0, 1e-36, 1e-30, 1e-22, 3e-5, 117.0, 1e30, 2e35, 1e37)):
        k, v, *rest = op_inputs(op, dims, "bf16", (0,), seed)
        inputs = (k * scale, v * scale, *rest)
        for g, w in zip(host_device.run(op, *inputs), op_named(op).reference(*inputs)):
            assert torch.equal(g, w), scale


@pytest.mark.parametrize("most", (1e-37, 1e-30, 0.75, 6.0, 448.0, 2688.0, 3.3e38))
def test_every_number_is_written_as_the_reference_does(host_device: Any, most: float) -> None:
    """Every bf16 number up to `most`, in the order of the bits (blocks of neighbours) and mixed."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = torch.where(every.float().abs() <= most, every, torch.zeros(()).bfloat16())
    mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))]
    op, dims = op_named("kv_cache_write_nvfp4"), {"S": 1, "L": 128, "H": 4, "D": 128}
    rest = op_inputs(op.name, dims, "bf16", (0,), 0)[2:]
    inputs = (every.view(128, 4, 128), mixed.view(128, 4, 128), *rest)
    for got, wanted in zip(host_device.run(op.name, *inputs), op.reference(*inputs)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("dtype, tolerance", (("bf16", 1e-2), ("fp32", 1e-5)))
@pytest.mark.parametrize("fmt", CACHE_FORMATS)
def test_attention(host_device: Any, fmt: str, dtype: str, tolerance: float, reverse: bool) -> None:
    host_device.reverse = reverse
    op = f"sink_attention_{fmt}"
    for table in ((-1,), (3, 0), (2, -1, 1)):
        inputs = op_inputs(op, ODD, dtype, table)
        wanted = op_named(op).reference(*inputs).double()
        (got,) = host_device.run(op, *inputs)
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_norm_and_rope(host_device: Any, dtype: str, reverse: bool) -> None:
    host_device.reverse = reverse
    sizes = (*SIZES[2:], {"L": 5, "H": 24, "D": 128}, {"L": 3, "H": 40, "D": 128}, {"L": 3, "H": 1, "D": 112})
    for dims in sizes:
        inputs = op_inputs("qk_norm_rope", dims, dtype)
        wanted = op_named("qk_norm_rope").reference(*inputs)
        for g, w in zip(host_device.run("qk_norm_rope", *inputs), wanted):
            assert_one_step_at_most(g, w)


def assert_one_step_at_most(got: Tensor, wanted: Tensor) -> None:
    """Equal but where another order of the sum rounds a norm the other way: seldom, and by a step of bf16 then."""
    step = {torch.bfloat16: 2**-7, torch.float32: 1e-6}[wanted.dtype]
    pairs = wanted.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*wanted.shape[:-1], -1, 2)
    assert ((got.double() - wanted.double()).abs() <= step * pairs.flatten(-2)).all()
    if wanted.dtype == torch.bfloat16:
        assert (got != wanted).double().mean() < 1e-3


def test_norm_and_rope_of_zeros_and_extremes(host_device: Any) -> None:
    q, k, *rest = op_inputs("qk_norm_rope", SIZES[2], "bf16")
    for scale in (0.0, 1e-20, 1e-4, 1e4):
        inputs = (q * scale, k * scale, *rest)
        for g, w in zip(host_device.run("qk_norm_rope", *inputs), op_named("qk_norm_rope").reference(*inputs)):
            assert_one_step_at_most(g, w)


def test_dequantize(host_device: Any) -> None:
    inputs = op_inputs("nvfp4_dequantize", DEQUANTIZE[0].sizes[1])
    assert torch.equal(host_device.run("nvfp4_dequantize", *inputs)[0], op_named("nvfp4_dequantize").reference(*inputs))
