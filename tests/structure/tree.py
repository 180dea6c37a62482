"""What the structure tests count: library files, their lines, their functions, and the files that a command enters."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("training", "export", "plugins", "engines", "runtime")


@cache
def library_files() -> tuple[Path, ...]:
    """Every Python file of ours outside tests, tracked or new."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    paths = {ROOT / name for name in listed if not name.startswith("tests/")}
    return tuple(sorted(path for path in paths if path.is_file()))


def lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> list[tuple[str, int]]:
    """(name, lines) of every function in a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(n.name, (n.end_lineno or n.lineno) - n.lineno + 1) for n in nodes if isinstance(n, kinds)]


class FirstPass(BaseException):
    """Raised in place of the first denoise pass."""


def files_entered(command: Callable[[], Any]) -> list[str]:
    """The library files in which a function is called while `command` runs; importing a file does not enter it."""
    entered: set[str] = set()
    names = {str(path): path.relative_to(ROOT).as_posix() for path in library_files()}

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function, no module's or class's body
            name = names.get(str(Path(frame.f_code.co_filename).resolve()))
            if name:
                entered.add(name)

    sys.setprofile(note)
    try:
        command()
    finally:
        sys.setprofile(None)
    return sorted(entered)
