"""Committed reports say with which command of this version they can be measured again, or why they cannot."""

from __future__ import annotations

import importlib
import json
import re
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


def test_every_report_is_linked_from_a_page() -> None:
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert not [path.name for path in REPORTS if f"measurements/{path.name})" not in text]


def test_the_experiment_s_results_say_where_they_come_from() -> None:
    results = json.loads((REPOSITORY / "docs" / "experiment" / "results.json").read_text(encoding="utf-8"))
    assert results["command"].startswith("longtake experiment") and len(results["commit"]) >= 7


def test_readme_s_table_says_what_the_reports_say() -> None:
    """Each cell, rounded: a row's own report, or what the first row's report measured PyTorch at."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Figures")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = rows
    assert head[1:] == ["DiT alone", "VAE", "end to end", "peak memory"] and len(rows) == 4
    linked = [re.search(r"\((docs/measurements/[\w.]+)\)", row[0]) for row in rows]
    reports = [json.loads((REPOSITORY / found[1]).read_text(encoding="utf-8")) for found in linked if found]
    against = {"eager": reports[0]["against"]["torch"], "compiled": reports[0]["against"]["torch_compile"]}
    for row, found in zip(rows, linked):
        report = reports.pop(0) if found else against[row[0].split()[-1]]
        measured = [*(report["fps"].get(name) for name in ("dit", "vae", "end_to_end")), report["peak_gb"]]
        for cell, figure in zip(row[1:], measured):
            assert not cell or float(cell.split()[0]) == round(figure, 1), (row[0], cell, figure)


def test_the_table_of_end_to_end_says_what_the_reports_say() -> None:
    """Each cell "DiT / end to end" or "DiT / lowest to highest", of the reports that its row links, in their order."""
    text = (REPOSITORY / "docs" / "kernels.md").read_text(encoding="utf-8").split("## End to end")[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:7]
    checked = 0
    for row in rows:
        names = re.findall(r"\(measurements/([\w.]+)\)", row[0])
        for name, cell in zip(names, filter(None, map(str.strip, row[1:])), strict=True):
            report = json.loads((REPOSITORY / "docs" / "measurements" / name).read_text(encoding="utf-8"))
            known = [report["fps"]] if "fps" in report else [one["fps"] for one in report["convolutions"].values()]
            told = [float(figure) for figure in re.findall(r"[\d.]+", cell)]
            assert told[0] in {round(fps["dit"], 1) for fps in known}, (name, cell)
            assert set(told[1:]) <= {round(fps["end_to_end"], 1) for fps in known}, (name, cell)
            checked += 1
    assert checked == 9
