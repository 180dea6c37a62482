"""docs/add-an-op.md, followed to the letter in a copy of the tree: its blocks are written, its command is run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add-an-op.md"
STAGES = ("engines", "export", "runtime", "training")
FILES = ("pyproject.toml", "tests/conftest.py", "tests/export/test_functions.py", "tests/helpers", "tests/structure")


def blocks() -> list[tuple[str, str, str]]:
    """(language, the file named just before it or "", text) of every block."""
    found, text = [], PAGE.read_text(encoding="utf-8")
    for match in re.finditer(r"```(\w+)\n(.*?)```\n", text, re.DOTALL):
        before = text[: match.start()].rstrip()
        named = re.search(r"`(plugins/[\w/.]+)`:$", before)
        found.append((match[1], named[1] if named else "", match[2]))
    return found


def patched(text: str, difference: str) -> str:
    """`text` with each line "+..." after the line that stands before it, "...", in `difference`."""
    after = ""
    for line in difference.splitlines():
        mark, content = line[:1], line[1:]
        if mark == "+":
            assert text.count(f"\n{after}\n") == 1, f"the page names a line that is not there: {after}"
            text = text.replace(f"\n{after}\n", f"\n{after}\n{content}\n")
        after = content
    return text


@pytest.fixture()
def tree(tmp_path: Path) -> Path:
    """The project, plugins and what tests them copied, the rest linked."""
    shutil.copytree(ROOT / "longtake", tmp_path / "longtake", symlinks=True)
    for stage in STAGES:
        (tmp_path / stage).symlink_to(ROOT / stage)
    for folder in ("plugins", "tests/plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name) if (ROOT / name).is_dir() else shutil.copy(
            ROOT / name, tmp_path / name
        )
    return tmp_path


@pytest.mark.slow
def test_the_page_adds_an_op(tree: Path) -> None:
    touched = set()
    for language, name, text in blocks():
        path = tree / name
        if language == "diff":
            path.write_text(patched(path.read_text(), text))
        elif name:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        touched |= {name} - {""}
    assert len(touched) <= 5
    (command,) = (text for language, _, text in blocks() if language == "bash")
    words = [sys.executable, *shlex.split(command)[1:], "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 9  # type: ignore[index]
