"""In which order ranks part: what was captured goes before the communicator, which waits for it; and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longtake.errors import LongtakeError
from longtake.runtime.parallel import comm
from longtake.runtime.parallel.backend import ShardedBackend
from longtake.runtime.parallel.comm import Comm


class Noted:
    """Two ranks' first one, that notes what is asked of it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        say = lambda word: lambda *given, **more: self.said.append(word)  # noqa: E731
        ranks = SimpleNamespace(world=2, patience=1.0, leave=say("leave"), settle=say("settle"))
        own: Any = SimpleNamespace(comm=ranks, device=torch.device("cpu"), preset=None, recipe=None, checkpoints=None, close=say("close"),
                                   inner=SimpleNamespace(weights={}, made_of={}), release=say("release"))  # fmt: skip
        followers: Any = SimpleNamespace(end=say("end"), tell=lambda about: None, why=lambda: "", silent=lambda: [1])
        self.backend = ShardedBackend(own, followers, "a test")


def test_graphs_go_before_the_communicator_at_the_end() -> None:
    noted = Noted()
    noted.backend.close()
    assert noted.said == ["end", "release", "leave", "close"]


def test_graphs_go_before_the_communicator_when_a_rank_is_lost() -> None:
    noted = Noted()
    with pytest.raises(LongtakeError, match="lost each other"), noted.backend.command({"do": "whole"}):
        raise TimeoutError("no answer within 1 s")
    assert noted.said == ["end", "release", "leave"]


def test_what_is_only_enqueued_is_waited_for() -> None:
    noted = Noted()
    with noted.backend.command({"do": "whole"}):
        noted.said.append("gathered")
    assert noted.said == ["gathered", "settle"]


def test_a_communicator_that_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(comm, "LEAVE_S", 0.05)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: never.wait(30))
    begun = time.monotonic()
    Comm(0, 2, torch.device("cuda"), 1.0).leave()
    never.set()
    assert time.monotonic() - begun < 20
