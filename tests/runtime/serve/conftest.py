"""Servers over the toy model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served

from longtake.runtime.generator import Generator
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.server import Settings
from longtake.runtime.serve.store import Store
from longtake.training.models.text.words import default_vocabulary, word_tokenizer

Start = Callable[..., Served]


@pytest.fixture
def start(make_toy: Any, make_generator: Any, tmp_path: Path) -> Iterator[Start]:
    """Starts servers over toys that take `pause_s` a pass: start(slots=2, limits=Limits(…)). words: they know the tiny model's."""
    running: list[Served] = []

    def begin(pause_s: float = 0.0, store: Path | None = None, words: bool = False, **settings: Any) -> Served:
        backends: list[Any] = []

        def make() -> Any:
            backend = make_toy()
            backends.append(backend)
            if pause_s:
                backend.hook = lambda call: time.sleep(pause_s)
            return Generator(backend, word_tokenizer(default_vocabulary())) if words else make_generator(backend)

        settings.setdefault("limits", Limits(user_sessions=8, user_jobs=8, grace_s=1.0))
        folder = store or tmp_path / "store"
        running.append(Served(make, folder, Settings(store=folder, **settings)))
        running[-1].backends = backends
        return running[-1]

    yield begin
    for server in running:
        if server._thread.is_alive():
            server.end()


@pytest.fixture
def server(start: Start) -> Served:
    """One that is as quick as it can be."""
    return start()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def generator(toy: Any, make_generator: Any) -> Any:
    return make_generator(toy)
