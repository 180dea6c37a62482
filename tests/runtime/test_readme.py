"""The README's links lead somewhere, its commands exist, and its Python runs."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import longtake
from longtake.commands.main import COMMANDS, parsed, split
from longtake.options import options_of
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


def typed(page: str) -> list[str]:
    """Every `longtake` command in the code blocks of a page, torchrun's included."""
    text = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL))
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    lines = [re.sub(r"^torchrun .*-m longtake ", "longtake ", line) for line in lines]
    return [re.sub(r"\$\w+", "NAME", line) for line in lines if line.startswith("longtake ")]


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in typed(page)])
def test_commands_parse(page: str, command: str) -> None:
    name, words = split(shlex.split(command)[1:])
    if hasattr(importlib.import_module(COMMANDS[name][0]), "COMMAND"):
        assert isinstance(parsed(name, words), list)
    for word in shlex.split(command):
        if word.startswith(("docs/", "training/")):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str) -> None:
    """`longtake train --context full` and the like: the command is there, and each option is one of its own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in re.findall(r"`(longtake [a-z][^`]*)`", text):
        name, words = split(command.split()[1:])
        module = importlib.import_module(COMMANDS[name][0])
        if hasattr(module, "COMMAND"):
            known = {flag for one in options_of(*module.COMMAND.options).values() for flag in one.names}
            asked = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help", "--config"}
            assert asked <= known, command


def test_no_page_names_a_module_to_start() -> None:
    for page in PAGES:
        assert not re.search(r"-m longtake\.", (ROOT / page).read_text(encoding="utf-8")), page


def test_the_python_runs(
    toy: Any, make_generator: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (code,) = blocks("python")
    monkeypatch.setattr(longtake.Generator, "from_pretrained", classmethod(lambda cls, name: make_generator(toy)))
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7 and printed[0].startswith("0 a yellow six drifts left")
    assert scope["starts_at"] == 3 and "a red three circles" in printed[3]
