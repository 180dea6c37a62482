from __future__ import annotations

import math

import pytest
import torch

from longtake.plugins.pointwise import apply_rope
from longtake.training.models.presets import TINY, WAN22_TI2V_5B, DiTConfig
from longtake.training.models.wan.rope import frame_positions, pair_split, rope_tables, timestep_sinusoid

LARGE = DiTConfig(dim=256, ffn_dim=64, layers=1, heads=2, channels=16, text_dim=8, text_len=8)


@pytest.mark.parametrize(("head_dim", "split"), [(128, (22, 21, 21)), (64, (12, 10, 10)), (32, (6, 5, 5))])
def test_pairs_are_split_between_time_height_and_width(head_dim: int, split: tuple[int, int, int]) -> None:
    assert pair_split(head_dim) == split


@pytest.mark.parametrize("config", [TINY.dit, LARGE])
def test_rotation_equals_complex_multiplication(config: DiTConfig) -> None:
    positions, grid = [8.0, 1500.5], (3, 4)
    split = pair_split(config.head_dim)
    cos, sin = rope_tables(config, positions, grid)
    x = torch.randn(2 * 12, config.heads, config.head_dim, dtype=torch.float64)
    got = apply_rope(x.float(), cos, sin)
    for frame, t in enumerate(positions):
        for h in range(3):
            for w in range(4):
                token = frame * 12 + h * 4 + w
                angles = [
                    p * 10000 ** (-2 * i / (2 * pairs)) for p, pairs in zip((t, h, w), split) for i in range(pairs)
                ]
                phasor = torch.polar(
                    torch.ones(len(angles), dtype=torch.float64), torch.tensor(angles, dtype=torch.float64)
                )
                turned = torch.view_as_complex(x[token].unflatten(-1, (-1, 2))) * phasor
                assert torch.allclose(got[token].double(), torch.view_as_real(turned).flatten(-2), atol=1e-6)


def test_tables_far_beyond_the_reference_s_1024_rows() -> None:
    """Chunk 625, whose first latent frame is 5000, after 13 cuts: the tables are fp64's, rounded once, at 704x1280."""
    preset = WAN22_TI2V_5B
    positions = frame_positions(preset, 625, 13)
    assert positions == [5000 + 13 * 8 + frame for frame in range(8)]
    cos, sin = rope_tables(preset.dit, positions, preset.grid_hw)
    assert cos.shape == sin.shape == (7040, 64) and cos.dtype == sin.dtype == torch.float32
    for frame, h, w in ((0, 0, 0), (3, 21, 39), (7, 5, 17)):
        token = (frame * 22 + h) * 40 + w
        angles = [positions[frame] * 10000 ** (-2 * i / 44) for i in range(22)]
        angles += [place * 10000 ** (-2 * i / 42) for place in (h, w) for i in range(21)]
        for table, exact in ((cos, math.cos), (sin, math.sin)):
            wanted = torch.tensor([exact(angle) for angle in angles], dtype=torch.float64)
            assert (table[token].double() - wanted).abs().max() < 2**-24  # half a unit in the last place near 1


def test_scores_depend_on_distance_only_far_out() -> None:
    q, k = torch.randn(2, 16, 4, 64).double().unbind(0)

    def score(t_q: float, t_k: float) -> torch.Tensor:
        tables = [rope_tables(TINY.dit, [t], TINY.grid_hw) for t in (t_q, t_k)]
        return (apply_rope(q.float(), *tables[0]) * apply_rope(k.float(), *tables[1])).sum(-1)

    assert torch.allclose(score(40, 8), score(20040, 20008), atol=1e-4)


def test_batched_positions_equal_single_ones() -> None:
    batched = rope_tables(TINY.dit, torch.tensor([[0.0, 1.0], [8.0, 9.0]]), TINY.grid_hw)[0]
    assert torch.equal(batched[1], rope_tables(TINY.dit, [8, 9], TINY.grid_hw)[0])


def test_sinusoid_is_cos_then_sin() -> None:
    row = timestep_sinusoid([999.0], 256)[0]
    assert row.shape == (256,) and row.dtype == torch.float32
    for i in (0, 1, 127):
        angle = 999 * 10000 ** (-i / 128)
        assert math.isclose(float(row[i]), math.cos(angle), abs_tol=1e-6)
        assert math.isclose(float(row[128 + i]), math.sin(angle), abs_tol=1e-6)
