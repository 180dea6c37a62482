"""Committed reports say with which command of this version they can be measured again, or why they cannot."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path

import pytest

from longtake.commands.main import COMMANDS, parsed, split
from longtake.paths import REPOSITORY

REPORTS = sorted((REPOSITORY / "docs" / "measurements").glob("*.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_report_can_be_run_again(path: Path) -> None:
    report = json.loads(path.read_text(encoding="utf-8"))
    command = report["rerun_with"]
    if not command:
        assert len(report["not_rerun_because"]) > 20
        return
    program, *words = shlex.split(command)
    assert program == "longtake"
    name, rest = split(words)
    if hasattr(importlib.import_module(COMMANDS[name][0]), "COMMAND"):
        assert isinstance(parsed(name, rest), list)
    for word in rest:
        if word.startswith(("docs/", "training/")):
            assert (REPOSITORY / word).exists(), word


def test_the_experiment_s_results_say_where_they_come_from() -> None:
    results = json.loads((REPOSITORY / "docs" / "experiment" / "results.json").read_text(encoding="utf-8"))
    assert results["command"].startswith("longtake experiment") and len(results["commit"]) >= 7
