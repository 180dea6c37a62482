"""Begins with the longest files; skips `gpu` tests, with the reason, on a machine without an NVIDIA GPU; keeps the log level
of each test its own; lets Ctrl-C and a closing terminal interrupt also where the suite was begun with them ignored (in the
background, by nohup)."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failures_kept import keep_failures
from longest import LONGEST

from longtake.files import write_json
from longtake.provenance import origin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--figures", type=Path, metavar="FOLDER", help="where long tests write what they measured, as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Undo ignored signals, which commands under test, and processes that they start, would inherit; what tests export and
    compile stays in the checkout; failures are kept where the environment says."""
    keep_failures(config)
    os.environ.setdefault("LONGTAKE_HOME", str(Path(__file__).resolve().parents[1] / "build"))
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; mark every gpu test as skipped unless CUDA is there."""
    here = Path(__file__).parent
    order = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    """A command that ran in a test logs to what was stderr there, which is closed now: later tests must not hear of it."""
    yield
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What a test measured; kept under its name in the folder that --figures names, if it passes."""
    about, facts = origin(), dict[str, Any]()  # of the code that runs, whatever is committed meanwhile
    failed = request.session.testsfailed
    yield facts
    folder, name = request.config.getoption("--figures"), request.node.name
    if folder is not None and request.session.testsfailed == failed:
        command = f"make test-long ARGS='{request.node.location[0]} -k {name} --figures {folder}'"
        why = "a make target, not a command: see command"
        about |= {"rerun_with": "", "not_rerun_because": why, "kind": "test", "command": command}
        conditions = {"cores": os.cpu_count(), "load": os.getloadavg()[2]}
        report = {**about, "conditions": conditions, "facts": facts}
        write_json(folder / f"{name.removeprefix('test_')}_cpu.json", report)


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """A test that runs a command sets the project's log level; the next test must not inherit it."""
    log = logging.getLogger("longtake")
    before = log.level
    yield
    log.setLevel(before)
