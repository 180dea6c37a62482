"""The op references, and the torch operators that are them, against the codec and torch's own attention."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import longtake.plugins.ops
from longtake.plugins.nvfp4.reference import dequantize, quantize
from longtake.plugins.sink_attention.reference import dequantize_kv

S, L, H, D = 4, 24, 3, 32


def block(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(L, H, D, generator=torch.Generator().manual_seed(seed)) * (0.5 + seed / 4)).to(dtype)


def int32(*entries: int) -> Tensor:
    return torch.tensor(entries, dtype=torch.int32)


def empty_cache(fmt: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    if fmt == "bf16":
        return [torch.zeros(S, 2, L, H, D, dtype=dtype)]
    bytes_ = [torch.zeros(S, 2, L, H, D // n, dtype=torch.int8) for n in (2, 16)]
    return [*bytes_, torch.zeros(S, 2)]


def write(fmt: str, k: Tensor, v: Tensor, cache: list[Tensor], slot: int) -> list[Tensor]:
    out = getattr(torch.ops.longtake, f"kv_cache_write_{fmt}")(k, v, *cache, int32(slot))
    return list(out) if isinstance(out, tuple | list) else [out]


def filled_cache(fmt: str, dtype: torch.dtype = torch.float32, slots: int = 3) -> list[Tensor]:
    """Slots 0 .. slots-1 hold the blocks 2i (K) and 2i+1 (V)."""
    cache = empty_cache(fmt, dtype)
    for i in range(slots):
        cache = write(fmt, block(2 * i, dtype), block(2 * i + 1, dtype), cache, i)
    return cache


def attend(fmt: str, q: Tensor, k: Tensor, v: Tensor, cache: list[Tensor], *table: int) -> Tensor:
    return getattr(torch.ops.longtake, f"sink_attention_{fmt}")(q, k, v, *cache, int32(*table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_stores_what_the_codec_says_in_that_slot_only(dtype: torch.dtype) -> None:
    before = filled_cache("nvfp4", dtype)
    kept = [t.clone() for t in before]
    k, v = block(7, dtype), block(8, dtype)
    after = write("nvfp4", k, v, before, 2)
    for i, x in enumerate((k, v)):
        packed = quantize(x, rule="mse", order="longlive")
        assert torch.equal(after[0][2, i].view(torch.uint8), packed.values)
        assert torch.equal(after[1][2, i].view(torch.uint8), packed.scales.view(torch.uint8))
        assert after[2][2, i] == packed.amax
    others = torch.tensor([0, 1, 3])
    for new, old, untouched in zip(after, before, kept):
        assert torch.equal(new[others], old[others])
        assert torch.equal(old, untouched), "the operator is functional"


@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_slot_minus_one_writes_nothing_and_returns_new_tensors(fmt: str) -> None:
    cache = filled_cache(fmt)
    for new, old in zip(write(fmt, block(7), block(8), cache, -1), cache):
        assert torch.equal(new, old) and new.data_ptr() != old.data_ptr()


def test_cache_takes_four_and_a_half_bits_an_element() -> None:
    values, scales, _ = empty_cache("nvfp4")
    assert 8 * (values.nbytes + scales.nbytes) / (S * 2 * L * H * D) == 4.5


def test_cached_keys_read_back_as_the_codec_says() -> None:
    back = dequantize_kv(*filled_cache("nvfp4"))
    for slot in range(3):
        for i in range(2):
            packed = quantize(block(2 * slot + i), rule="mse", order="longlive")
            assert torch.equal(back[slot, i], dequantize(packed, order="longlive"))
    assert back[3].eq(0).all(), "a slot never written holds zeros"


@pytest.mark.parametrize("fmt, table", [(f, t) for f in ("nvfp4", "bf16") for t in ((-1,), (0, -1), (2, -1, 0), (1,))])
def test_attention_is_torchs_over_the_listed_slots(fmt: str, table: tuple[int, ...]) -> None:
    cache = filled_cache(fmt)
    q, k, v = block(0), block(1), block(2)
    slots = dequantize_kv(*cache) if fmt == "nvfp4" else cache[0]
    keys, values = (
        torch.cat([(k, v)[i] if slot < 0 else slots[slot, i] for slot in table]).transpose(0, 1) for i in range(2)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values).transpose(0, 1)
    out = attend(fmt, q, k, v, cache, *table)
    assert out.shape == (L, H, D) and out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_order_of_the_table_does_not_matter_but_its_entries_do(fmt: str) -> None:
    cache, (q, k, v) = filled_cache(fmt), (block(0), block(1), block(2))
    out = attend(fmt, q, k, v, cache, 0, 1, 2, -1)
    torch.testing.assert_close(out, attend(fmt, q, k, v, cache, -1, 2, 0, 1), rtol=1e-5, atol=1e-5)
    assert (out - attend(fmt, q, k, v, cache, 0, -1, 2)).abs().max() > 0.1


def test_bf16_activations_come_back_as_bf16_rounded_once() -> None:
    cache = filled_cache("nvfp4")
    q, k, v = (block(i, torch.bfloat16) for i in range(3))
    out = attend("nvfp4", q, k, v, cache, 1, -1)
    wide = attend("nvfp4", q.float(), k.float(), v.float(), cache, 1, -1)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.to(torch.bfloat16))


def test_weight_dequantization_is_exact_in_bf16_for_every_code_and_scale() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(1, 32, 8).expand(127, 32, 8).reshape(-1, 8)
    scales = torch.arange(127, dtype=torch.int8).repeat_interleave(32).view(-1, 1)
    weight = torch.ops.longtake.nvfp4_dequantize(values, scales)
    codes = np.stack([values.numpy().view(np.uint8) & 15, values.numpy().view(np.uint8) >> 4], -1).reshape(-1, 16)
    scale = scales.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
    assert weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(weight.double().numpy(), expected)


def test_importing_the_operators_again_is_harmless() -> None:
    importlib.reload(longtake.plugins.ops)
    values, scales = torch.zeros(48, 32, dtype=torch.int8), torch.zeros(48, 4, dtype=torch.int8)
    assert torch.ops.longtake.nvfp4_dequantize(values, scales).shape == (48, 64)
