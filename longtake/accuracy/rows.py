"""The rows of a comparison with PyTorch, their gate, and the one table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longtake.errors import GateError


@dataclass(frozen=True)
class Row:
    """One compared tensor. error: relative L2; max_abs: the largest difference; gate: what the recipe allows. `layer`
    rows show where an error grows; only outputs and blocks can fail the gate."""

    network: str
    case: str
    output: str
    against: str
    error: float
    max_abs: float
    gate: float
    layer: bool = False

    @property
    def passed(self) -> bool:
        return self.layer or self.error <= self.gate

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def require_gate(rows: Sequence[Row], what: str) -> None:
    """Raise GateError naming the worst row of `what` if any fails."""
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: row.error / row.gate if row.error == row.error else float("inf"))
        raise GateError(
            f"{what}: {len(failed)} of {len(rows)} comparisons fail the accuracy gate",
            got=f"{worst.network}, {worst.case}, {worst.output}: relative error {worst.error:.2e} against {worst.against}",
            expected=f"at most {worst.gate:g}",
            fix="look for the layer where it begins: longtake check --layers",
        )


def worst_of_kinds(rows: Sequence[Row]) -> list[Row]:
    """The worst case of every kind of output a network has, against each runner."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.network, kind_of(row), row.against)
        if key not in worst or not row.error <= worst[key].error:
            worst[key] = row
    return list(worst.values())


def kind_of(row: Row) -> str:
    """Outputs that differ in a number only are one kind; all inner layers of a network are one."""
    if row.layer:
        return "Linears, convolutions"
    parts = row.output.replace(".", "_").removesuffix("_out").split("_")
    return " ".join(part for part in parts if not part.isdigit())


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of the worst case of every kind; failing rows are marked."""
    lines = [f"{'network':13} {'output':22} {'against':13} {'worst case':20} {'rel. L2':>9} {'max abs':>9} {'gate':>6}"]
    for row in worst_of_kinds(rows):
        verdict = "" if row.layer else "ok" if row.passed else "FAIL"
        place = f"{row.network:13} {kind_of(row):22} {row.against:13} {row.case:20}"
        gate = "" if row.layer else f"{row.gate:g}"
        lines.append(f"{place} {row.error:9.2e} {row.max_abs:9.2e} {gate:>6} {verdict}")
    return lines
