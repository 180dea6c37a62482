"""A run that is killed leaves the names of what had failed by then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longtake.paths import REPOSITORY

TESTS = """
import time, pytest

@pytest.fixture
def broken():
    raise OSError("no engines")

def test_passes(): pass
def test_fails(): assert 6 * 7 == 41, "sum"
def test_errs(broken): pass
def test_hangs(): time.sleep(600)
"""


@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_failures_outlive_a_killed_run(tmp_path: Path, processes: list[str]) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text((REPOSITORY / "tests" / "conftest.py").read_text())
    kept, helpers = tmp_path / "failed.jsonl", REPOSITORY / "tests" / "helpers"
    places = os.pathsep.join(map(str, (REPOSITORY, helpers)))
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    environment |= {"LONGTAKE_TEST_FAILURES": kept.name, "PYTHONPATH": places}
    command = [sys.executable, "-m", "pytest", "-p", "no:schemathesis", *processes, "test_some.py"]
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(1200):
            lines = kept.read_text().splitlines() if kept.is_file() else []
            if len(lines) == 2 or run.poll() is not None:
                break
            time.sleep(0.1)
        assert run.poll() is None, "it hangs in its last test"
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    failed, erred = map(json.loads, lines)
    assert (failed["test"], failed["phase"]) == ("test_some.py::test_fails", "call")
    assert failed["seconds"] >= 0 and "AssertionError: sum" in failed["traceback"]
    assert (erred["test"], erred["phase"]) == ("test_some.py::test_errs", "setup")
    assert "OSError: no engines" in erred["traceback"]
