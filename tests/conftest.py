"""Skips `gpu` tests, with the reason, on a machine without an NVIDIA GPU; keeps the log level of each test its own; lets
Ctrl-C and a closing terminal interrupt also where the suite was begun with them ignored (in the background, by nohup)."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure() -> None:
    """Undo ignored signals, which commands under test, and processes that they start, would inherit; and what tests
    export and compile stays in the checkout."""
    os.environ.setdefault("LONGTAKE_HOME", str(Path(__file__).resolve().parents[1] / "build"))
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every gpu test as skipped unless CUDA is there."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """A test that runs a command sets the project's log level; the next test must not inherit it."""
    log = logging.getLogger("longtake")
    before = log.level
    yield
    log.setLevel(before)
