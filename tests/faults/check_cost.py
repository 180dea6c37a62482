"""What the checks cost the good path: their part of opening a model and of its first chunks. Fails above 1 %.

PYTHONPATH=. python tests/faults/check_cost.py --engines FOLDER --backend reference --out REPORT.json

Counted are the readers of JSON and YAML files with their digests of themselves, the comparison of manifests, and what is
kept so that a chunk can be made again: in the run itself, because a second run without them differs by more than they
take. Reading a file is counted whole, though it was read before there were checks: the figure is an upper bound. It is
processor time of the process. The digests of plans and weights are told, too; they are older, and not judged.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longtake import record
from longtake.files import write_json
from longtake.formats import bundle, exported, plan, recipe
from longtake.provenance import origin
from longtake.runtime import rewind
from longtake.runtime.backends.trt import engine
from longtake.runtime.generator import Generator
from longtake.training.models import presets, side_file

PROMPT = "a green seven drifts left over a dark blue background, soft light"
MOST_PERCENT = 1.0
REPEATS = 5
OLDER = "digests of plans and weights"
CHECKS: dict[str, list[tuple[Any, str]]] = {
    "readers": [(record.Kind, "read"), (record.Kind, "content"), (record.Kind, "record"), (recipe, "read_yaml"),
                (presets, "read_yaml"), (side_file, "read_json"), (engine, "read_json")],
    "manifests": [(bundle.Bundle, "check_plan")],
    "state before a chunk": [(rewind.CopiedPast, "before"), (rewind.ReplayedPast, "after")],
    OLDER: [(exported, "sha256"), (bundle, "sha256"), (plan, "_intact_bytes")],
}  # fmt: skip


class Meter:
    """Processor seconds by kind of check while it is entered."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._inside = 0

    def __enter__(self) -> Meter:
        self._before = [(place, name, getattr(place, name)) for places in CHECKS.values() for place, name in places]
        for kind, places in CHECKS.items():
            for place, name in places:
                setattr(place, name, self._counted(kind, getattr(place, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, function in self._before:
            setattr(place, name, function)

    def _counted(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any, **more: Any) -> Any:
            begun, self._inside = time.thread_time(), self._inside + 1
            try:
                return function(*words, **more)
            finally:
                self._inside -= 1
                if not self._inside:
                    self.spent[kind] += time.thread_time() - begun

        return counted


def measure(engines: Path, backend: str) -> dict[str, Any]:
    """Processor seconds of opening and of the first chunks, and of the checks in each."""
    told: dict[str, Any] = {}

    def note(part: str, begun: float) -> None:
        seconds, checks = time.process_time() - begun, dict(meter.spent)
        judged = sum(spent for kind, spent in checks.items() if kind != OLDER)
        told[part] = {"s": seconds, "percent": 100 * judged / seconds, "checks_s": checks}
        meter.spent.clear()

    with Meter() as meter:
        begun = time.process_time()
        generator = Generator.from_engines(engines, backend=backend)
        note("opening", begun)
        with generator, generator.session(PROMPT, seed=0, endless=True) as session:
            for part in ("first chunk", "second chunk"):
                begun = time.process_time()
                next(session).frames  # noqa: B018
                note(part, begun)
    return told


def held(told: dict[str, Any]) -> bool:
    """Whether no part of it is above the bound."""
    return all(part["percent"] <= MOST_PERCENT for part in told.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=Path, required=True, help="engines, or an export for --backend reference")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--out", type=Path, help="where the report is written")
    asked = parser.parse_args()
    told = [measure(asked.engines, asked.backend) for _ in range(1 + REPEATS)][1:]  # the first one imports, too
    for name in told[0]:
        parts = [each[name] for each in told]
        print(
            f"{name}: {parts[0]['s']:.2f} s, {max(p['percent'] for p in parts):.3f} % of it checks: {parts[0]['checks_s']}"
        )
    if asked.out:
        why = "a program of tests/faults, not a command: see command"
        write_json(asked.out, {**origin(), "not_rerun_because": why, "backend": asked.backend,
                               "most_percent": MOST_PERCENT, "runs": told})  # fmt: skip
    return 0 if all(map(held, told)) else 1


if __name__ == "__main__":
    sys.exit(main())
