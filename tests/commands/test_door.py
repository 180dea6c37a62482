"""The root door is lazy and typed, and `longtake --help` loads next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import longtake

HEAVY = ("longtake.training.trainer", "modelopt", "matplotlib", "transformers", "onnxruntime")


def loaded(code: str, *modules: str) -> list[str]:
    """Which of `modules` a process has loaded after `code`."""
    code = f"{code}\nimport sys\nprint('loaded', *(m for m in {modules!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


def test_the_door_opens_without_what_a_session_does_not_need() -> None:
    assert (
        loaded("from longtake import Generator, Session, Chunk, LongtakeError, Story", *HEAVY, "av", "jsonschema") == []
    )


def least(code: str) -> float:
    """The least of what three processes print last: seconds, which other work on the machine makes more."""

    def run() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    return min(float(run().split()[-1]) for _ in range(3))


def test_the_door_takes_little_more_than_torch() -> None:
    """Processor time: 0.3 s here."""
    code = "import time, torch\nbegun = time.process_time()\nfrom longtake import Generator\nprint(time.process_time() - begun)"
    assert least(code) < 0.6


def test_importing_the_package_loads_nothing() -> None:
    assert loaded("import longtake", "torch", "numpy", "longtake.runtime") == []
    assert loaded("from longtake import LongtakeError", "torch", "numpy") == []


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_and_version_load_no_torch(words: list[str]) -> None:
    code = f"from longtake.commands.main import main\nmain({words!r})"
    assert loaded(code, "torch", "numpy", "yaml", "argparse") == []


def test_help_and_version_are_fast() -> None:
    """Processor time: 0.1 s, where the bound for a user is 0.5."""
    code = "import time\nfrom longtake.commands.main import main\nmain(['--help'])\nprint(time.process_time())"
    assert least(code) < 0.5


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(hasattr(longtake, name) for name in longtake.__all__)
    assert set(dir(longtake)) == set(longtake.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = longtake.Trainer
