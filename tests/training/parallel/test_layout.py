from __future__ import annotations

import itertools

import pytest
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.models.wan.slots import visible_blocks
from longtake.training.models.wan.window import full_history, window_history
from longtake.training.parallel.layout import MODES, NONE, Layout

CHUNKS, TOKENS = 8, 3
CUTS = {"full": None, "window": (), "cuts": (2, 5)}
LAYOUTS = [Layout(NONE, CHUNKS, 1), *(Layout(mode, CHUNKS, ranks) for mode in MODES for ranks in (1, 2, 4, 8))]
LAYOUTS += [Layout("naive", 8, 16), Layout("naive", 3, 2)]


def ids(layout: Layout) -> str:
    return f"{layout.mode}-{layout.chunks}-on-{layout.ranks}"


def cuts_of(name: str, chunks: int) -> list[bool]:
    return [i in (CUTS[name] or ()) for i in range(chunks)]


def history_of(name: str, chunks: int) -> Tensor:
    return full_history(chunks) if name == "full" else window_history(cuts_of(name, chunks), 4)


def places_by_rank(layout: Layout) -> list[tuple[bool, int]]:
    """(noisy, chunk) of every block, written out the long way."""
    if layout.mode == "balanced":
        share = layout.chunks // layout.ranks
        return [
            (noisy, rank * share + i) for rank in range(layout.ranks) for noisy in (False, True) for i in range(share)
        ]
    clean = layout.chunks - (layout.mode == NONE)
    return [(False, i) for i in range(clean)] + [(True, i) for i in range(layout.chunks)]


@pytest.mark.parametrize("context", CUTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_the_mask_is_the_rule_by_brute_force(layout: Layout, context: str) -> None:
    blocks = places_by_rank(layout)
    history = history_of(context, layout.chunks)
    mask, seen = layout.mask(history), layout.seen(history, complete=True)
    for (i, q), (j, k) in itertools.product(enumerate(blocks), repeat=2):
        (q_noisy, q_chunk), (k_noisy, k_chunk) = q, k
        may = k_chunk <= q_chunk
        if context != "full":
            may = k_chunk in visible_blocks(cuts_of(context, layout.chunks), 4)[q_chunk]
        if q_noisy:
            wanted = q_chunk == k_chunk if k_noisy else may and k_chunk != q_chunk
        else:
            wanted = may and not k_noisy
        assert bool(mask[i, j]) == wanted == (j in seen[i]), (q, k)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_the_ranks_parts_are_the_sequence_and_clean_comes_first(layout: Layout) -> None:
    parts = [layout.local(rank) for rank in range(layout.ranks)]
    assert tuple(place for part in parts for place in part) == layout.order
    assert sorted(layout.order) == [
        i for i in range(2 * layout.chunks) if layout.mode != NONE or i != layout.chunks - 1
    ]
    for rank, part in enumerate(parts):
        assert list(part) == layout.clean(rank) + [layout.chunks + i for i in layout.noisy(rank)]


def test_only_balanced_gives_all_ranks_as_many_loss_tokens() -> None:
    assert [len(Layout("balanced", 8, 4).noisy(rank)) for rank in range(4)] == [2, 2, 2, 2]
    assert [len(Layout("naive", 8, 4).noisy(rank)) for rank in range(4)] == [0, 0, 4, 4]


def test_only_the_last_clean_chunk_is_skipped() -> None:
    for layout in LAYOUTS:
        empty = [layout.order[i] for i, keys in enumerate(layout.seen(full_history(layout.chunks))) if not keys]
        assert empty == ([] if layout.mode == NONE else [layout.chunks - 1])


@pytest.mark.parametrize(
    ("mode", "chunks", "ranks", "message"),
    [("balanced", 6, 4, "6 chunks can't be dealt out evenly to 4 ranks"), ("naive", 5, 4, "twice the chunks a multiple"),
     ("stripes", 4, 2, "unknown --sp-mode"), (NONE, 4, 2, "unknown --sp-mode")],
)  # fmt: skip
def test_what_can_t_be_dealt_out_is_refused(mode: str, chunks: int, ranks: int, message: str) -> None:
    with pytest.raises(LongtakeError, match=message):
        Layout(mode, chunks, ranks)
