"""Imports go down. `make lint` checks the contract in pyproject.toml; here: that it names every part, and no circles."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from typing import Any

import grimp
import pytest
import tree

ABOVE = {"models", "experiment"}  # floors of their own


@cache
def contracts() -> dict[str, dict[str, Any]]:
    settings = tomllib.loads((tree.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["id"]: contract for contract in settings["tool"]["importlinter"]["contracts"]}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("longtake")


def test_the_contract_is_kept() -> None:
    """In a process of its own: the linter sets up logging anew, and silences the loggers that are there."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = {**os.environ, "PYTHONPATH": str(tree.ROOT)}
    done = subprocess.run(command, cwd=tree.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_exception_is_listed() -> None:
    assert not [contract for contract in contracts().values() if "ignore_imports" in contract]


def test_every_part_of_training_stands_in_the_contract(graph: grimp.ImportGraph) -> None:
    parts = graph.find_children("longtake.training") - {f"longtake.training.{name}" for name in ABOVE}
    assert set(contracts()["training"]["source_modules"]) == parts
    assert set(contracts()["models"]["forbidden_modules"]) == parts


def test_every_floor_stands_in_the_contract(graph: grimp.ImportGraph) -> None:
    floors = {name.strip() for floor in contracts()["floors"]["layers"] for name in floor.split("|")}
    children = graph.find_children("longtake") - {"longtake.training", "longtake.__main__"}
    assert floors == children | {f"longtake.training.{name}" for name in ABOVE}


def circles(graph: grimp.ImportGraph) -> Iterator[list[str]]:
    """Groups of files that import each other, directly or around (Tarjan's strongly connected components)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for other in graph.find_modules_directly_imported_by(module):
            if other not in numbers:
                yield from visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], numbers[other])
        if lowest[module] == numbers[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                yield circle

    for module in sorted(graph.modules):
        if module not in numbers:
            yield from visit(module)


def test_no_files_import_each_other(graph: grimp.ImportGraph) -> None:
    assert not [sorted(circle) for circle in circles(graph)]
