"""The NVFP4 codec against ModelOpt, ml_dtypes and plain numpy, on every code, tie and scale edge."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from swizzle import swizzle_scales
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.plugins.nvfp4.formats import decode_e4m3, encode_e2m1, encode_e4m3, round_e2m1
from longtake.plugins.nvfp4.layout import bytes_from_int8, int8_from_bytes, pack_nibbles, unswizzle_scales
from longtake.plugins.nvfp4.reference import (
    ORDERS,
    RULE_LIMITS,
    Packed,
    dequantize,
    fake_quantize,
    quantize,
)

E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def with_neighbours(x: np.ndarray) -> np.ndarray:
    """x, and the next fp32 below and above."""
    return np.concatenate([x, np.nextafter(x, np.float32(-np.inf)), np.nextafter(x, np.float32(np.inf))])


def samples(seed: int, shape: tuple[int, ...], scale: float) -> Tensor:
    """Heavy-tailed values: blocks of very different sizes, one block of zeros."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng) * torch.exp(2 * torch.randn(shape, generator=rng)) * scale
    x.view(-1)[:16] = 0.0
    return x


def as_bytes(x: Tensor) -> np.ndarray:
    return x.view(torch.uint8).numpy()


# --- the formats


def test_e2m1_codes_equal_ml_dtypes_on_every_bf16_value() -> None:
    x = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    x = x[x.isfinite()]
    expected = (x + 0.0).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(encode_e2m1(x).numpy(), expected)
    np.testing.assert_array_equal(round_e2m1(x).numpy(), E2M1[expected])


def test_e2m1_ties_go_to_the_even_code_and_their_neighbours_to_the_nearest() -> None:
    grid = E2M1[:8]
    ties = with_neighbours((grid[1:] + grid[:-1]) / 2)
    x = np.concatenate([ties, -ties, with_neighbours(grid), -grid, np.float32([7, 1e30, -1e30, np.inf, -np.inf])])
    expected = np.clip(x + np.float32(0), -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(encode_e2m1(torch.from_numpy(x)).numpy(), expected)
    np.testing.assert_array_equal(round_e2m1(torch.from_numpy(x)).numpy(), E2M1[expected])
    assert encode_e2m1(torch.tensor([-0.0, -1e-30])).tolist() == [0.0, 8.0]


def test_e4m3_codes_equal_ml_dtypes_on_every_value_tie_and_neighbour() -> None:
    ties = (E4M3[1:] + E4M3[:-1]) / 2
    sweep = np.geomspace(1e-6, 448, 100_001, dtype=np.float32)
    x = np.concatenate([with_neighbours(ties), with_neighbours(E4M3[1:-1]), E4M3, sweep, np.float32([1e-45, 0])])
    expected = x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(encode_e4m3(torch.from_numpy(x)).numpy(), expected)
    assert encode_e4m3(torch.tensor([449.0, 1e9, torch.inf])).tolist() == [126.0] * 3
    np.testing.assert_array_equal(decode_e4m3(torch.arange(127, dtype=torch.int32)).numpy(), E4M3)


# --- decoding: all codes x all scales


@pytest.mark.parametrize("amax", [1.0, 0.37, 3e-30, 1e30])
def test_every_code_with_every_scale_dequantizes_in_the_stated_order(amax: float) -> None:
    values = pack_nibbles(torch.arange(16, dtype=torch.uint8)).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    peak, limit = np.float32(amax), np.float32(6 * 448)
    packed = Packed(values, scales, torch.tensor(amax), "static_6")
    expected = {
        "modelopt": E2M1 * (E4M3[:, None] * (peak / limit)),
        "longlive": E2M1 * E4M3[:, None] * peak / limit,
    }
    for order in ORDERS:
        np.testing.assert_array_equal(dequantize(packed, order=order).numpy(), expected[order])


# --- whole tensors against the oracles


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 3e4, 1e30])
@pytest.mark.parametrize("shape", [(16,), (3, 48), (64, 256), (2, 5, 4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_to_modelopt(scale: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    for seed, override in ((0, None), (1, 0.5), (2, 3.0)):
        x = samples(seed, shape, scale).to(dtype)
        if shape == (16,):
            x = x + scale  # ModelOpt divides by a zero amax
        amax = x.abs().max().float() * (override or 1.0)
        tensor, scales, g = NVFP4QTensor.quantize(x.clone(), 16, weights_scaling_factor_2=amax / (6.0 * 448.0))
        packed = quantize(x, amax=None if override is None else amax)
        assert torch.equal(packed.values, tensor._quantized_data)
        np.testing.assert_array_equal(as_bytes(packed.scales), as_bytes(scales))
        back = tensor.dequantize(torch.float32, scale=scales, double_scale=g, block_sizes={-1: 16})
        assert torch.equal(dequantize(packed), back)
        assert torch.equal(fake_quantize(x, amax=amax), back.to(dtype))


@pytest.mark.parametrize("rule", ["static_6", "static_4"])
def test_bit_equal_to_ml_dtypes(rule: str) -> None:
    m2, m3 = (np.float32(m) for m in RULE_LIMITS[rule])
    x = samples(3, (512, 512), 1.0).numpy()
    blocks = x.reshape(512, 32, 16)
    g = np.abs(x).max() / (m2 * m3)
    peak = np.abs(blocks).max(-1)
    raw = np.where(peak == 0, np.float32(1), np.clip(peak / (m2 * g), np.float32(2**-9), np.float32(448)))
    scales = raw.astype(ml_dtypes.float8_e4m3fn)
    step = (scales.astype(np.float32) * g)[..., None]
    q = np.clip(blocks / step, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    codes = q.view(np.uint8).reshape(512, 512)
    packed = quantize(torch.from_numpy(x), rule=rule)
    np.testing.assert_array_equal(packed.values.numpy(), codes[:, ::2] | codes[:, 1::2] << 4)
    np.testing.assert_array_equal(as_bytes(packed.scales), scales.view(np.uint8))
    np.testing.assert_array_equal(dequantize(packed).numpy(), (q.astype(np.float32) * step).reshape(512, 512))


def longlive_candidate(x: np.ndarray, amax: np.ndarray, factor: float, limit: float) -> tuple[np.ndarray, ...]:
    """(codes, scales, values) of [n, 16] blocks by the released codec's formula, in numpy."""
    enc = np.float32(limit) / amax
    raw = np.abs(x).max(-1) / np.float32(6) * enc * np.float32(factor)
    scales = np.minimum(raw, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    wide = scales.astype(np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(wide > 0, x * (np.float32(1) / ((np.float32(1) / enc) * wide)), np.float32(0))
    q = np.clip(y, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return q.view(np.uint8), scales, q.astype(np.float32) * wide * amax / np.float32(limit)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_longlive_order_equals_the_released_formula(scale: float) -> None:
    for seed in range(20):  # each has another amax, whose enc must be rounded once
        x = samples(seed, (512, 16), scale).to(torch.bfloat16).float().numpy()
        codes, scales, back = longlive_candidate(x, np.abs(x).max(), 1.0, 6 * 448)
        packed = quantize(torch.from_numpy(x), rule="static_6", order="longlive")
        np.testing.assert_array_equal(packed.values.numpy(), codes[:, ::2] | codes[:, 1::2] << 4)
        np.testing.assert_array_equal(as_bytes(packed.scales)[:, 0], scales.view(np.uint8))
        np.testing.assert_array_equal(dequantize(packed, order="longlive").numpy(), back)


@pytest.mark.parametrize("rule", ["mse", "mae", "abs_max"])
def test_four_over_six_takes_four_only_where_its_error_is_smaller(rule: str) -> None:
    x = samples(5, (4096, 16), 1.0).numpy()
    candidates = [longlive_candidate(x, np.abs(x).max(), factor, 6 * 256) for factor in (1.0, 1.5)]
    errors = []
    for _, _, back in candidates:
        d = {"mse": (back - x) ** 2, "mae": np.abs(back - x), "abs_max": np.abs(back - x)}[rule]
        for half in (8, 4, 2, 1):
            d = np.maximum(d[:, :half], d[:, half:]) if rule == "abs_max" else d[:, :half] + d[:, half:]
        errors.append(d[:, 0])
    four = errors[1] < errors[0]
    assert 0.1 < four.mean() < 0.9
    codes, scales, back = (np.where(four.reshape(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(*candidates))
    packed = quantize(torch.from_numpy(x), rule=rule, order="longlive")
    np.testing.assert_array_equal(packed.values.numpy(), codes[:, ::2] | codes[:, 1::2] << 4)
    np.testing.assert_array_equal(as_bytes(packed.scales)[:, 0], scales.view(np.uint8))
    np.testing.assert_array_equal(dequantize(packed, order="longlive").numpy(), back)
    better = ((back - x) ** 2).sum() < ((candidates[0][2] - x) ** 2).sum()
    assert better or rule != "mse"


@pytest.mark.parametrize("order", ORDERS)
def test_a_tie_between_four_and_six_keeps_six(order: str) -> None:
    x = torch.zeros(2, 16)
    x[0, 3] = 12.0  # exact both as 6 x 2 and as 4 x 3
    x[1, :2] = torch.tensor([12.0, 9.0])  # 9 = 3 x 3 is exact only with four
    packed = quantize(x, rule="mse", order=order, amax=1536.0)
    assert packed.scales.float().flatten().tolist() == [2.0, 3.0]
    assert torch.equal(dequantize(packed, order=order), x)


def test_the_two_orders_are_not_the_same_arithmetic() -> None:
    x = samples(6, (1024, 256), 1.0)
    a, b = (quantize(x, order=order) for order in ORDERS)
    assert not torch.equal(dequantize(a, order="modelopt"), dequantize(b, order="longlive"))
    assert (a.values != b.values).float().mean() < 0.01


# --- shapes, tiles, edges


@pytest.mark.parametrize("rule", RULE_LIMITS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_2d", [False, True])
def test_fake_quantize_is_quantize_then_dequantize(rule: str, order: str, block_2d: bool) -> None:
    x = samples(7, (32, 64), 0.1).to(torch.bfloat16)
    packed = quantize(x, rule=rule, order=order, block_2d=block_2d)
    fake = fake_quantize(x, rule=rule, order=order, block_2d=block_2d)
    assert fake.dtype == torch.bfloat16 and packed.rule == rule
    assert torch.equal(fake, dequantize(packed, order=order, dtype=torch.bfloat16))
    assert (fake.float() - x.float()).norm() / x.float().norm() < 0.2


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_tiles_quantize_a_matrix_and_its_transpose_alike(rule: str) -> None:
    x = samples(8, (48, 80), 1.0)
    there = fake_quantize(x, rule=rule, order="longlive", block_2d=True)
    back = fake_quantize(x.T.contiguous(), rule=rule, order="longlive", block_2d=True).T
    if rule == "static_6":
        assert torch.equal(there, back)
    else:  # a tile's error is summed over columns first, so a near tie may fall the other way
        assert (there != back).float().mean() < 0.02
    scales = quantize(x, rule=rule, block_2d=True).scales.float().unflatten(0, (-1, 16))
    assert torch.equal(scales, scales[:, :1].expand_as(scales))


def test_an_amax_for_each_row_equals_row_by_row() -> None:
    x = samples(9, (4, 64), 1.0)
    amax = x.abs().amax(dim=-1, keepdim=True)
    whole = quantize(x, rule="mse", order="longlive", amax=amax)
    for i in range(4):
        row = quantize(x[i], rule="mse", order="longlive")
        assert torch.equal(whole.values[i], row.values)
        assert torch.equal(dequantize(whole, order="longlive")[i], dequantize(row, order="longlive"))


@pytest.mark.parametrize("rule", RULE_LIMITS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("peak", [0.0, 1e-45, 1e-38, 1e-30, 1e35])
def test_zero_tiny_and_huge_tensors_stay_finite(rule: str, order: str, peak: float) -> None:
    x = torch.linspace(-1, 1, 64).reshape(2, 32) * peak
    back = fake_quantize(x, rule=rule, order=order)
    assert back.isfinite().all() and back.abs().max() <= max(peak * 1.01, 1e-45)
    if peak == 0.0:
        assert quantize(x, rule=rule, order=order).values.eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULE_LIMITS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_gpu_gives_the_same_bits(rule: str, order: str) -> None:
    for seed in range(10):
        x = samples(seed, (256, 256), 1.0)
        for block_2d in (False, True):
            here, there = (quantize(y, rule=rule, order=order, block_2d=block_2d) for y in (x, x.cuda()))
            assert torch.equal(here.values, there.values.cpu())
            np.testing.assert_array_equal(as_bytes(here.scales), as_bytes(there.scales.cpu()))
            assert torch.equal(dequantize(here, order=order), dequantize(there, order=order).cpu())


# --- layout


def test_the_low_nibble_is_the_even_index_and_bytes_survive_int8() -> None:
    codes = torch.arange(256).view(-1, 1) // torch.tensor([1, 16]) % 16
    assert torch.equal(pack_nibbles(codes).flatten(), torch.arange(256))
    every = torch.arange(256, dtype=torch.float32)
    assert torch.equal(int8_from_bytes(every).view(torch.uint8), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(bytes_from_int8(int8_from_bytes(every)), torch.arange(256, dtype=torch.int32))


def test_storage_is_four_and_a_half_bits_an_element() -> None:
    packed = quantize(torch.randn(256, 512))
    assert 8 * (packed.values.nbytes + packed.scales.nbytes) / (256 * 512) == 4.5


@pytest.mark.parametrize("rows, cols", [(128, 4), (256, 8), (1, 1), (130, 7), (384, 192)])
def test_swizzled_scales_lie_where_the_index_formula_says(rows: int, cols: int) -> None:
    scales = torch.randint(1, 127, (rows, cols), dtype=torch.uint8).view(torch.float8_e4m3fn)
    flat = as_bytes(swizzle_scales(scales))
    wide = -(-cols // 4) * 4
    r, c = np.indices((rows, cols))
    index = (((r // 128) * (wide // 4) + c // 4) * 32 + r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
    np.testing.assert_array_equal(flat[index], as_bytes(scales))
    assert flat.size == -(-rows // 128) * 128 * wide and np.count_nonzero(flat) == rows * cols
    np.testing.assert_array_equal(as_bytes(unswizzle_scales(swizzle_scales(scales), rows, cols)), as_bytes(scales))


# --- bad input


def test_errors_name_what_was_got_and_what_fits() -> None:
    x = torch.zeros(4, 32)
    with pytest.raises(LongtakeError, match="unknown NVFP4 rule\n  got: static_5\n  expected: static_6, static_4"):
        quantize(x, rule="static_5")
    with pytest.raises(LongtakeError, match="unknown NVFP4 order\n  got: torch"):
        fake_quantize(x, order="torch")
    with pytest.raises(LongtakeError, match=r"got: \[4, 30\]\n  expected: a last dimension multiple of 16"):
        quantize(torch.zeros(4, 30))
    with pytest.raises(LongtakeError, match="last two dimensions multiples of 16"):
        quantize(x, block_2d=True)
    with pytest.raises(LongtakeError, match="got: 100 elements\n  expected: 512 for 4 x 2"):
        unswizzle_scales(torch.zeros(100, dtype=torch.uint8), 4, 2)
