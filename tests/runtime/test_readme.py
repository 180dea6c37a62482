"""The README's links lead somewhere, its commands exist, and its Python runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.commands.main import parsed, split
from longtake.runtime.generator import Generator

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith(program + " ")]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith(("http", "#"))]
    missing = [t for t in targets if not ((ROOT / page).parent / t.split("#")[0]).exists()]
    assert targets or page != "README.md"
    assert not missing
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
    assert {t[1:] for t in re.findall(r"\]\((#[^)]+)\)", text)} <= headings


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for line in commands("make")} | set(re.findall(r"`make (\w+)", README))
    assert {"demo", "test", "setup"} <= targets
    assert all(re.search(rf"^(?:\.PHONY:.*\s)?{target}\b", makefile, re.M) for target in targets)


@pytest.mark.parametrize("command", commands("longtake"))
def test_commands_parse(command: str) -> None:
    assert parsed(*split(shlex.split(command)[1:]))
    for word in shlex.split(command):
        if word.startswith(("docs/", "training/")):
            assert (ROOT / word).exists(), word


def test_the_python_runs(
    toy: Any, make_generator: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (code,) = blocks("python")
    monkeypatch.setattr(Generator, "from_engines", classmethod(lambda cls, engines: make_generator(toy)))
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7 and printed[0].startswith("0 a yellow six drifts left")
    assert scope["starts_at"] == 3 and "a red three circles" in printed[3]
