"""The slot table against an independent token-level simulation of the reference's cache."""

from __future__ import annotations

import itertools
from typing import Any

from longtake.training.models.wan.slots import CURRENT, SlotTable, slots_from_json, visible_blocks
from longtake.training.models.wan.window import window_history

TOKENS = 3  # tokens of a block: the rules are in tokens, any size shows them
BLOCKS = 12


class TokenCache:
    """The reference's cache of one layer: a flat buffer that rolls, with a pinned region. Holds the block of each token."""

    def __init__(self) -> None:
        self.capacity = 4 * TOKENS
        self.data: list[int | None] = [None] * self.capacity
        self.global_end = self.local_end = 0
        self.pinned_start, self.pinned_len = -1, 0

    def effective_sink(self) -> int:
        if self.pinned_len and self.pinned_start == TOKENS:
            return TOKENS + self.pinned_len
        return TOKENS

    def forward(self, block: int) -> list[int]:
        """One pass over `block` (as every denoise pass and the clean pass do); the tokens it attends to."""
        start, end = block * TOKENS, (block + 1) * TOKENS
        if end > self.global_end and self.local_end + TOKENS > self.capacity:
            sink = self.effective_sink()
            evicted = self.local_end + TOKENS - self.capacity
            rolled = self.local_end - evicted - sink
            self.data[sink : sink + rolled] = self.data[sink + evicted : sink + evicted + rolled]
            if self.pinned_start >= sink:
                self.pinned_start -= evicted
            local_end = self.local_end + (end - self.global_end) - evicted
        else:
            local_end = self.local_end + (end - self.global_end)
        self.data[local_end - TOKENS : local_end] = [block] * TOKENS
        self.global_end, self.local_end = end, local_end
        assert start == end - TOKENS
        return [token for token in self.data[:local_end] if token is not None]

    def pin(self) -> None:
        self.pinned_start, self.pinned_len = self.local_end - TOKENS, TOKENS


def simulated(cuts: tuple[bool, ...]) -> list[list[int]]:
    """Blocks seen by each block, per the simulation; two denoise passes and the clean pass each."""
    cache, seen = TokenCache(), []
    for block, cut in enumerate(cuts):
        tokens = cache.forward(block)
        assert cache.forward(block) == tokens and cache.forward(block) == tokens
        seen.append([tokens[i] for i in range(0, len(tokens), TOKENS)])
        assert len(tokens) == TOKENS * len(seen[-1])
        if cut and block:
            cache.pin()
    return seen


def all_patterns() -> list[tuple[bool, ...]]:
    return [(False, *rest) for rest in itertools.product((False, True), repeat=BLOCKS - 1)]


def test_every_cut_pattern_equals_the_simulation() -> None:
    for cuts in all_patterns():
        assert [list(blocks) for blocks in visible_blocks(cuts, 4)] == simulated(cuts), cuts


def test_slots_hold_what_the_table_says_and_retries_are_safe() -> None:
    """Run the table against real slots: what a chunk reads is what was written, even if an attempt failed before."""
    for cuts in all_patterns()[::7]:
        slots: list[Any] = [None] * 4
        table = SlotTable(4)
        for block, cut in enumerate(cuts):
            doomed = table.plan(not cut)
            slots[doomed.write_slot] = "rubbish from a pass that failed"
            plan = table.plan(cut)
            assert plan.write_slot == doomed.write_slot and plan.write_slot not in plan.table
            read = [block if slot == CURRENT else slots[slot] for slot in plan.table]
            assert read == list(plan.visible)
            slots[plan.write_slot] = block
            table = plan.after


def test_table_of_the_reference() -> None:
    """Reference 2.5: the window around a cut at k = 6, in a video that had a protected shot sink P = 2."""
    seen = visible_blocks([i in (2, 6) for i in range(11)], 4)
    assert seen[1] == (0, 1) and seen[2] == (0, 1, 2)
    assert seen[5] == (0, 2, 4, 5)
    assert seen[6] == (0, 2, 5, 6)  # the cut block still sees the old shot's sink
    assert seen[7] == (0, 5, 6, 7)  # P dropped, the new sink floats
    assert seen[8] == (0, 6, 7, 8)
    assert seen[9] == (0, 6, 8, 9)
    assert seen[10] == (0, 6, 9, 10)


def test_without_cuts_only_block_0_is_kept() -> None:
    assert visible_blocks([False] * 8, 4)[-1] == (0, 5, 6, 7)


def test_a_cut_at_block_0_is_no_cut() -> None:
    assert visible_blocks([True] + [False] * 7, 4) == visible_blocks([False] * 8, 4)


def test_json_round_trip() -> None:
    table = SlotTable(4)
    for cut in (False, True, False, False, True):
        table = table.plan(cut).after
    assert slots_from_json(table.as_json()) == table


def test_equals_the_training_window() -> None:
    """Training shows the model the same blocks as the cache will."""
    for cuts in all_patterns()[::5]:
        trained_on = window_history(cuts, 4)
        for block, seen in enumerate(simulated(cuts)):
            assert trained_on[block].nonzero().flatten().tolist() == seen, (cuts, block)
