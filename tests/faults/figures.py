"""The figures of docs/faults.md as a program: `make fuzz`, `make soak`. Prints a table, writes JSON, fails below it.

PYTHONPATH=. python tests/faults/figures.py fuzz --out docs/measurements/faults_fuzz_cpu.json

A report is written row by row; the rows that are not asked for keep what an earlier run wrote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "helpers")]

import fault_runs  # noqa: E402
import fault_seeds  # noqa: E402
import fault_sessions  # noqa: E402
import faults  # noqa: E402

from longtake.files import read_json, write_json  # noqa: E402
from longtake.provenance import commit, cpu_name, versions  # noqa: E402

Rows = dict[str, Callable[[], faults.Row]]


def fuzz(asked: argparse.Namespace, place: Path) -> Rows:
    share, seed = asked.share, asked.seed
    return {
        "engines": lambda: faults.altered_engines(round(1000 * share), seed, place / "engines"),
        "files": lambda: faults.fuzzed_files(
            round(10_000 * share), seed, fault_seeds.seeds(place / "seeds"), _made(place / "fuzz")
        ),
        "chunk": lambda: fault_sessions.boundaries(round(294 * share), round(300 * share), seed),
    }


def soak(asked: argparse.Namespace, place: Path) -> Rows:
    share, export = asked.share, fault_runs.export_of(asked.export, place / "export")
    runs = fault_runs.Runs(export, _made(place / "runs"), asked.seed)
    return {
        "soak": lambda: fault_runs.soak(export, round(1500 * share), asked.seed),
        **{f"kill-{name}": partial(runs.kills, name, max(1, round(n * share))) for name, n in fault_runs.KILLS.items()},
        "end": runs.endings,
        "memory": lambda: runs.address_space(max(3, round(14 * share))),
        "disk": lambda: runs.full_disk(max(2, round(16 * share))),
        "race": lambda: runs.races(max(1, round(6 * share))),
    }


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


PROGRAMS: dict[str, Callable[[argparse.Namespace, Path], Rows]] = {"fuzz": fuzz, "soak": soak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of cases (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", help="which, with commas between (default all)")
    parser.add_argument("--export", type=Path, help="an exported tiny-4step, to spare making one")
    parser.add_argument("--out", type=Path, help="where the report is written")
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="longtake-faults-"))
    rows = PROGRAMS[asked.program](asked, place)
    wanted = asked.rows.split(",") if asked.rows else list(rows)
    if unknown := set(wanted) - set(rows):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    held, of = True, commit()
    for name in wanted:
        row = faults.timed(rows[name])
        print("".join(f"WRONG  {row.what}: {wrong}\n" for wrong in row.wrong), end="", flush=True)
        held = held and not row.wrong
        if asked.out:
            _report(asked, name, row, of)
    if held:
        shutil.rmtree(place)
    else:
        print(f"what was wrong is kept in {place}")
    return 0 if held else 1


def _report(asked: argparse.Namespace, name: str, row: faults.Row, of: str | None) -> None:
    rows = read_json(asked.out)["rows"] if asked.out.exists() else {}
    words = f"make {asked.program} ARGS='--share {asked.share:g} --seed {asked.seed} --rows {name}'"
    rows[name] = {**asdict(row), "command": words, "commit": of, "cpu": cpu_name(), "load": os.getloadavg()[1]}
    told = {
        "kind": "faults",
        "rerun_with": "",
        "not_rerun_because": "a make target, not a command: see each row's command",
    }
    write_json(asked.out, {**told, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
