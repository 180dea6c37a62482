"""Streams of one's own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

from longtake import cuda_streams as streams
from longtake.cuda_streams import acquire_stream


class Owner:
    pass


@pytest.fixture
def few_streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """torch hands out the same 32 streams again and again."""
    made: list[Any] = []
    numbers = count()

    def stream(device: torch.device) -> tuple[torch.device, int]:
        made.append((device, next(numbers) % 32))
        return made[-1]

    monkeypatch.setattr(streams, "_free", {})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield made
    gc.collect()


def test_a_stream_has_one_owner_at_a_time(few_streams: list[Any]) -> None:
    kept = Owner()
    mine = acquire_stream(torch.device("cuda"), kept)
    for _ in range(100):
        one, other = Owner(), Owner()
        lent = [acquire_stream(torch.device("cuda:0"), owner) for owner in (one, other, one)]
        assert len({mine, *lent}) == 4
    assert len(few_streams) <= 7  # the last owners live until the next are made


def test_each_device_has_its_own(few_streams: list[Any]) -> None:
    first = Owner()
    stream = acquire_stream(torch.device("cuda:1"), first)
    del first
    gc.collect()
    second = Owner()
    assert acquire_stream(torch.device("cuda:0"), second) != stream
    assert acquire_stream(torch.device("cuda:1"), second) == stream


@pytest.mark.gpu
def test_many_owners_never_share_a_stream() -> None:
    kept, device = Owner(), torch.device("cuda")
    mine = acquire_stream(device, kept)
    for _ in range(100):
        owner = Owner()
        assert acquire_stream(device, owner).cuda_stream != mine.cuda_stream
