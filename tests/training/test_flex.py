from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longtake.errors import LongtakeError
from longtake.training.models.wan.slots import visible_blocks
from longtake.training.models.wan.window import full_history, window_history
from longtake.training.objective.flex import chosen, flex_attention_for, natural_order, seen_places, tiled_mask
from longtake.training.objective.teacher_forcing import Clips, block_attention

TOKENS = 128
CUTS = [[False, False, True, False, False], [False, True, False, False, True]]
HISTORIES = {
    "full": full_history(5),
    "window": window_history(CUTS[0], 4),
    "batch": torch.stack([window_history(cuts, 4) for cuts in CUTS]),
}
ORDERS = {
    "natural": natural_order(5),
    "two by two": (0, 1, 5, 6, 2, 3, 7, 8, 4, 9),  # as ranks put [clean ; noisy] halves together
    "shuffled": tuple(random.Random(0).sample(range(10), 10)),
}


def brute_force(kind: str, order: tuple[int, ...]) -> Tensor:
    """Token by token, from the rule in words: bool [B, 1, S T, S T]."""
    rows = []
    for cuts in CUTS[: 2 if kind == "batch" else 1]:
        mask = torch.zeros(len(order) * TOKENS, len(order) * TOKENS, dtype=torch.bool)
        for i, q in enumerate(order):
            for j, k in enumerate(order):
                may = list(range(q % 5 + 1)) if kind == "full" else visible_blocks(cuts, 4)[q % 5]
                if q < 5:
                    seen = k < 5 and k in may
                else:
                    seen = k == q or (k < 5 and k in may and k != q - 5)
                mask[i * TOKENS : (i + 1) * TOKENS, j * TOKENS : (j + 1) * TOKENS] = seen
        rows.append(mask[None])
    return torch.stack(rows)


def random_qkv(order: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, len(order) * TOKENS, 2, 16, generator=generator).to(device) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", HISTORIES)
def test_flex_attention_equals_the_brute_force_mask(kind: str, order: str) -> None:
    places = ORDERS[order]
    mask, qkv = brute_force(kind, places), random_qkv(places)
    out = flex_attention_for(HISTORIES[kind], 5, TOKENS, places)(0, *qkv)
    assert torch.allclose(out, dense(*qkv, mask), atol=1e-5)


@pytest.mark.parametrize("kind", HISTORIES)
def test_flex_attention_equals_block_by_block(kind: str) -> None:
    history, qkv = HISTORIES[kind], random_qkv(natural_order(5))
    clips = Clips(torch.zeros(2, 1), torch.zeros(2, 5, 1), history, 5 if kind == "full" else 4)
    assert torch.allclose(
        flex_attention_for(history, 5, TOKENS)(0, *qkv), block_attention(clips, TOKENS)(0, *qkv), atol=1e-5
    )


@pytest.mark.parametrize("tile", [128, 384])
def test_the_kernel_skips_exactly_what_is_not_seen(tile: int) -> None:
    """The compiled kernel goes by the tiles' lists alone and never evaluates the rule."""
    seen = seen_places(HISTORIES["batch"], natural_order(5))
    mask = tiled_mask(seen, 384, tile)
    pieces = 384 // tile
    wanted = seen.repeat_interleave(pieces, -1).repeat_interleave(pieces, -2)
    assert not mask.kv_num_blocks.any() and mask.seq_lengths == (9 * 384, 9 * 384)
    for sample in range(2):
        for row, (count, index) in enumerate(zip(mask.full_kv_num_blocks[sample, 0], mask.full_kv_indices[sample, 0])):
            assert sorted(index[:count].tolist()) == wanted[sample, row].nonzero().flatten().tolist()
        for column, (count, index) in enumerate(zip(mask.full_q_num_blocks[sample, 0], mask.full_q_indices[sample, 0])):
            assert sorted(index[:count].tolist()) == wanted[sample, :, column].nonzero().flatten().tolist()
    q, k = torch.arange(0, 9 * 384, 64)[:, None], torch.arange(0, 9 * 384, 64)[None]
    rule = torch.stack([mask.mask_mod(torch.tensor(b), torch.tensor(0), q, k) for b in range(2)])
    assert torch.equal(rule, seen.repeat_interleave(6, -1).repeat_interleave(6, -2))


@pytest.mark.slow
def test_compiled_for_the_cpu_it_is_the_same() -> None:
    history, places = HISTORIES["window"], natural_order(5)
    q, k, v = (x.transpose(1, 2) for x in random_qkv(places))
    mask = tiled_mask(seen_places(history, places), TOKENS)
    out = torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=mask)
    assert torch.allclose(out.transpose(1, 2), dense(*random_qkv(places), brute_force("window", places)), atol=1e-5)


def test_large_masks_are_coarse() -> None:
    seen = seen_places(full_history(12), natural_order(12))
    assert tiled_mask(seen, 7040).BLOCK_SIZE == (128, 128)
    assert tiled_mask(seen_places(full_history(24), natural_order(24)), 7040).BLOCK_SIZE == (7040, 7040)


def test_what_is_chosen_and_bad_input() -> None:
    cpu = torch.device("cpu")
    assert not chosen("auto", cpu, 100, 7040) and not chosen("blocks", torch.device("cuda"), 100, 7040)
    with pytest.raises(LongtakeError, match="can't train this here") as caught:
        chosen("flex", cpu, 5, 128)
    assert "--attention auto" in str(caught.value)
    with pytest.raises(LongtakeError, match="don't divide into tiles"):
        tiled_mask(torch.ones(3, 3, dtype=torch.bool), 100)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [128, 640])
@pytest.mark.parametrize("kind", HISTORIES)
def test_on_a_gpu_output_and_gradients_equal_block_by_block(kind: str, tile: int) -> None:
    history, tokens = HISTORIES[kind].cuda(), 640  # 5 * 128, as 7040 is 55 * 128
    mask = tiled_mask(seen_places(history, natural_order(5)), tokens, tile)
    leaves = [torch.randn(2, 9 * tokens, 3, 64, device="cuda", requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 9 * tokens, 3, 64, device="cuda")
    clips = Clips(torch.zeros(2, 1), torch.zeros(2, 5, 1), history, 5 if kind == "full" else 4)
    run = torch.compile(flex_attention, dynamic=False)
    results = []
    for attend in (
        lambda q, k, v: block_attention(clips, tokens)(0, q, k, v),
        lambda q, k, v: run(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2),
    ):
        halves = [x.bfloat16() for x in leaves]
        out = attend(*halves)
        results.append([out.float(), *torch.autograd.grad(out, leaves, upstream.bfloat16())])
    for wanted, got in zip(*results):
        assert float((wanted - got).norm() / wanted.norm()) < 1e-2


@pytest.mark.gpu
def test_on_a_gpu_long_sequences_take_it() -> None:
    gpu = torch.device("cuda")
    assert chosen("auto", gpu, 12, 7040) and not chosen("auto", gpu, 5, 128) and chosen("flex", gpu, 5, 128)
