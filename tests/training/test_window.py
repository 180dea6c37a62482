from __future__ import annotations

import itertools

import pytest
import torch

from longtake.training.models.wan.slots import visible_blocks
from longtake.training.models.wan.window import block_mask, full_history, shot_offsets, window_history


def cuts_at(blocks: int, *cuts: int) -> list[bool]:
    return [block in cuts for block in range(blocks)]


@pytest.mark.parametrize(
    ("cuts", "block", "seen"),
    [
        ((), 2, [0, 1, 2]),
        ((), 6, [0, 4, 5, 6]),
        ((6,), 6, [0, 4, 5, 6]),
        ((6,), 7, [0, 5, 6, 7]),
        ((6,), 8, [0, 6, 7, 8]),
        ((6,), 9, [0, 6, 8, 9]),
        ((2, 6), 6, [0, 2, 5, 6]),
        ((2, 6), 7, [0, 5, 6, 7]),
        ((2, 6), 9, [0, 6, 8, 9]),
        ((0,), 5, [0, 3, 4, 5]),
    ],
)
def test_window_is_the_reference_table(cuts: tuple[int, ...], block: int, seen: list[int]) -> None:
    assert visible_blocks(cuts_at(10, *cuts), 4)[block] == tuple(seen)
    assert window_history(cuts_at(10, *cuts), 4)[block].nonzero().flatten().tolist() == seen


def test_window_holds_at_most_four_and_always_first_previous_and_current() -> None:
    for pattern in itertools.product((False, True), repeat=8):
        for block in range(8):
            seen = visible_blocks(pattern, 4)[block]
            assert len(seen) == min(4, block + 1)
            assert {0, max(0, block - 1), block} <= set(seen)


def test_shot_offset_grows_at_each_cut_but_not_at_the_start() -> None:
    assert shot_offsets(cuts_at(6, 0, 2, 5), 8) == [0, 0, 8, 8, 8, 16]


@pytest.mark.parametrize("cuts", [None, (2,), (1, 4)])
def test_mask_equals_the_rule_by_brute_force(cuts: tuple[int, ...] | None) -> None:
    blocks, frames, tokens = 6, 2, 3
    history = full_history(blocks) if cuts is None else window_history(cuts_at(blocks, *cuts), 4)
    per_block = frames * tokens
    mask = block_mask(history).repeat_interleave(per_block, 0).repeat_interleave(per_block, 1)
    half = blocks * per_block
    for q, k in itertools.product(range(2 * half), repeat=2):
        q_block, k_block = q % half // per_block, k % half // per_block
        may = k_block <= q_block if cuts is None else k_block in visible_blocks(cuts_at(blocks, *cuts), 4)[q_block]
        if q < half:
            wanted = k < half and may
        else:
            wanted = (k < half and may and k_block != q_block) or (k >= half and k_block == q_block)
        assert bool(mask[q, k]) == wanted, (q, k)


def test_batched_masks() -> None:
    histories = torch.stack([full_history(5), window_history(cuts_at(5, 1), 4)])
    masks = block_mask(histories)
    assert torch.equal(masks[1], block_mask(histories[1])) and masks.shape == (2, 10, 10)
