"""The command line changes only where a review sees it: every flag stands in flags.txt."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from longtake.commands.main import COMMANDS
from longtake.commands.options import help_of
from longtake.options import MISSING, Option, options_of

HERE = Path(__file__).parent


def test_the_flags_are_those_on_record() -> None:
    made = subprocess.run([sys.executable, str(HERE / "flags.py")], capture_output=True, text=True, check=True).stdout
    recorded = (HERE / "flags.txt").read_text()
    gone, new = set(recorded.splitlines()) - set(made.splitlines()), set(made.splitlines()) - set(recorded.splitlines())
    assert made == recorded, f"gone: {gone}; new: {new}; if that is wanted: see flags.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_text_is_there_and_shows_its_default(name: str) -> None:
    command = getattr(importlib.import_module(COMMANDS[name][0]), "COMMAND", None)
    options: dict[str, Option] = {} if command is None else options_of(*command.options)
    for one in options.values():
        shown = help_of(one)
        assert one.facts.get("hidden") or one.default is MISSING or "default" in shown, one.names
        assert one.facts.get("hidden") or "default None" not in shown, one.names
