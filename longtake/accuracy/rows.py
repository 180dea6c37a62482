"""The rows of a comparison with PyTorch, their gate, and the one table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longtake.errors import GateError


@dataclass(frozen=True)
class Row:
    """One compared tensor. error: relative L2; max_abs: the largest difference; gate: what is allowed. `layer` rows show
    where an error grows; only outputs and blocks can fail the gate. `part`: both sides were given the same numbers there,
    and the error is that of the worst channel. `informs`: of a network that is judged by its parts. `stored`: a weight as
    the file holds it; its error is that of the worst element."""

    network: str
    case: str
    output: str
    against: str
    error: float
    max_abs: float
    gate: float
    layer: bool = False
    part: bool = False
    informs: bool = False
    stored: bool = False

    @property
    def passed(self) -> bool:
        return self.layer or self.informs or self.error <= self.gate

    @property
    def verdict(self) -> str:
        """A word for the table; "edge": codes on an edge fell the other way, which the parts show to be all there is."""
        if self.layer:
            return ""
        return "FAIL" if not self.passed else "ok" if self.error <= self.gate else "edge"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


TRAINING = "how well the model is trained plays no part"
SAME_INPUTS = (
    f": both sides are given the same numbers there, so that only fp32's rounding is left (2e-5 at most); {TRAINING}"
)
SAME_WEIGHTS = f": the file holds this weight in codes or bf16, and read back it must be the checkpoint's; {TRAINING}"
STORED_FIX = (
    "see whether these are the checkpoints that were exported (digests in export.json); if so, please report it"
)
LAYERS_FIX = "look for the layer where it begins: longtake check --layers"


def require_gate(rows: Sequence[Row], what: str, fix: str = LAYERS_FIX) -> None:
    """Raise GateError naming the worst row of `what` if any fails; `fix`: what to do that was not done just now."""
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: row.error / row.gate if row.error == row.error else float("inf"))
        meaning = SAME_INPUTS if worst.part else SAME_WEIGHTS if worst.stored else ""
        raise GateError(
            f"{what}: {len(failed)} of {len(rows)} comparisons fail the accuracy gate",
            got=f"{worst.network}, {worst.case}, {worst.output}: relative error {worst.error:.2e} against {worst.against}",
            expected=f"at most {worst.gate:g}{meaning}",
            fix=STORED_FIX if worst.stored else fix,
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
    """Outputs that differ in a number only are one kind; all inner layers of a network are one, and all its parts."""
    if row.part:
        return "each part by itself"
    if row.stored:
        return "weights as stored"
    if row.layer:
        return "Linears, convolutions"
    parts = row.output.replace(".", "_").removesuffix("_out").split("_")
    return " ".join(part for part in parts if not part.isdigit())


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of the worst case of every kind, in columns; failing rows are marked."""
    worst = worst_of_kinds(rows)
    lines = [("network", "output", "against", "worst case", "rel. L2", "max abs", "gate", "")]
    for row in worst:
        gate = "" if row.layer else f"{row.gate:g}"
        figures = f"{row.error:.2e}", f"{row.max_abs:.2e}", gate, row.verdict
        lines.append((row.network, kind_of(row), row.against, row.case, *figures))
    text = aligned(lines, right=(4, 5, 6))
    if any(row.verdict == "edge" for row in worst):
        text.append("edge: codes on an edge fell the other way, and others after them; part by part the graph agrees")
    return text


def aligned(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of cells in columns, each as wide as its widest cell; those in `right` end at the same place."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        " ".join(
            cell.rjust(n) if i in right else cell.ljust(n) for i, (cell, n) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
