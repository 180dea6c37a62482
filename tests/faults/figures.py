"""The figures of docs/faults.md as a program: `make fuzz`, `make soak`. Prints a table, writes JSON, fails below it.

PYTHONPATH=. python tests/faults/figures.py fuzz --out docs/measurements/faults_fuzz_cpu.json
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "helpers")]

import fault_runs  # noqa: E402
import fault_seeds  # noqa: E402
import fault_sessions  # noqa: E402
import faults  # noqa: E402

from longtake.files import write_json  # noqa: E402
from longtake.provenance import commit, cpu_name, versions  # noqa: E402

Rows = Callable[[argparse.Namespace, Path], list[faults.Row]]


def fuzz(asked: argparse.Namespace, place: Path) -> list[faults.Row]:
    share = asked.share
    return [
        faults.timed(faults.altered_engines, round(1000 * share), asked.seed, place / "engines"),
        faults.timed(
            faults.fuzzed_files,
            round(10_000 * share),
            asked.seed,
            fault_seeds.seeds(place / "seeds"),
            _made(place / "fuzz"),
        ),
        faults.timed(fault_sessions.boundaries, round(294 * share), round(300 * share), asked.seed),
    ]


def soak(asked: argparse.Namespace, place: Path) -> list[faults.Row]:
    share, export = asked.share, fault_runs.export_of(asked.export, place / "export")
    runs = fault_runs.Runs(export, _made(place / "runs"), asked.seed)
    wanted = asked.rows.split(",")
    rows = {
        "soak": lambda: faults.timed(fault_runs.soak, export, round(1500 * share), asked.seed),
        "kill": lambda: faults.timed(runs.kills, {"train": 60, "export": 20, "engines": 20, "generate": 40}, share),
        "end": lambda: faults.timed(runs.endings),
        "memory": lambda: faults.timed(runs.address_space, max(3, round(14 * share))),
        "disk": lambda: faults.timed(runs.full_disk, max(2, round(16 * share))),
        "race": lambda: faults.timed(runs.races, max(1, round(6 * share))),
    }
    return [make() for name, make in rows.items() if name in wanted]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


PROGRAMS: dict[str, Rows] = {"fuzz": fuzz, "soak": soak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of cases (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="soak,kill,end,memory,disk,race", help="of soak: which (default all)")
    parser.add_argument("--export", type=Path, help="an exported tiny-4step, to spare making one")
    parser.add_argument("--out", type=Path, help="where the report is written")
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="longtake-faults-"))
    rows = PROGRAMS[asked.program](asked, place)
    print("\n".join(row.line() for row in rows))
    for row in rows:
        for wrong in row.wrong:
            print(f"WRONG  {row.what}: {wrong}")
    held = all(not row.wrong for row in rows)
    if asked.out:
        words = f"make {asked.program} ARGS='--share {asked.share:g} --seed {asked.seed} --rows {asked.rows}'"
        told = {"kind": "faults", "command": words, "commit": commit(), "cpu": cpu_name(), "versions": versions(),
                "seed": asked.seed, "share": asked.share, "held": held, "rows": faults.report(rows)}  # fmt: skip
        write_json(asked.out, told)
    if held:
        shutil.rmtree(place)
    else:
        print(f"what was wrong is kept in {place}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
