"""Keeps what failed, whatever ends the run: each failure is a line of JSON as soon as it is told.

    LONGTAKE_TEST_FAILURES=failed.jsonl python -m pytest ... -n 8

With xdist only the process that leads writes: it is told of everything that its workers find.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FILE = "LONGTAKE_TEST_FAILURES"
MOST = 1500  # characters of a traceback, its end


class FailuresKept:
    """Appends to `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # a test may change the folder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            told = {"test": report.nodeid, "phase": report.when, "seconds": round(report.duration, 2)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**told, "traceback": report.longreprtext[-MOST:]}) + "\n")


def keep_failures(config: pytest.Config) -> None:
    """Where the environment names a file, and this is no worker."""
    if (name := os.environ.get(FILE)) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresKept(Path(name)))
