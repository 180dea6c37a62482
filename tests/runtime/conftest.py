"""Fixtures of a deterministic toy backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from toy_backend import ToyBackend, toy_tokenize

from longtake.runtime.generator import Generator


@pytest.fixture
def toy() -> ToyBackend:
    """A fresh toy backend."""
    return ToyBackend()


@pytest.fixture
def make_toy() -> Callable[[], ToyBackend]:
    """Makes toy backends."""
    return ToyBackend


@pytest.fixture
def make_generator() -> Callable[[ToyBackend], Generator]:
    """Wraps a toy backend in a generator."""
    return lambda backend: Generator(backend, toy_tokenize)
