"""The table of docs/faults.md, in its short form (slow) and in full (long); `make fuzz` and `make soak` print it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fault_runs
import fault_seeds
import fault_sessions
import faults
import pytest

SHARES = [pytest.param(0.05, id="short"), pytest.param(1.0, id="full", marks=pytest.mark.long)]
full_or_short = pytest.mark.parametrize("share", SHARES)


@full_or_short
def test_altered_engines_are_refused(tmp_path: Path, share: float) -> None:
    assert not faults.altered_engines(round(1000 * share), 1, tmp_path).wrong


@full_or_short
def test_fuzzed_files_are_refused_in_our_words(tmp_path: Path, share: float) -> None:
    (tmp_path / "fuzz").mkdir()
    assert not faults.fuzzed_files(
        round(10_000 * share), 1, fault_seeds.seeds(tmp_path / "seeds"), tmp_path / "fuzz"
    ).wrong


@full_or_short
def test_every_boundary_of_a_chunk(share: float) -> None:
    assert not fault_sessions.boundaries(round(294 * share), round(300 * share), 1).wrong


def test_a_row_that_does_not_hold_says_so(tmp_path: Path) -> None:
    """The programs fail below the table: a reader that lets a damaged file through, or one that raises what it likes."""
    path = tmp_path / "a.yaml"
    path.write_text("a: 1")
    (tmp_path / "fuzz").mkdir()

    def careless(altered: Path) -> object:
        return altered.read_bytes().decode("utf-8").index("a: 1")

    row = faults.fuzzed_files(60, 1, {"careless": (path, careless)}, tmp_path / "fuzz")
    assert any("ValueError" in wrong or "UnicodeDecodeError" in wrong for wrong in row.wrong) and "WRONG" in row.line()


@pytest.fixture
def runs(export: Path, tmp_path: Path) -> Iterator[fault_runs.Runs]:
    yield fault_runs.Runs(export, tmp_path, 1)


SOAKS = [
    pytest.param(60, id="short", marks=pytest.mark.timeout(1500)),
    pytest.param(1500, id="full", marks=[pytest.mark.long, pytest.mark.timeout(14_400)]),
]
RUNS = [
    pytest.param(0.04, id="short", marks=pytest.mark.timeout(1500)),
    pytest.param(1.0, id="full", marks=[pytest.mark.long, pytest.mark.timeout(14_400)]),
]


@pytest.mark.slow
@pytest.mark.parametrize("chunks", SOAKS)
def test_soak(export: Path, chunks: int) -> None:
    assert not fault_runs.soak(export, chunks, 1).wrong


@pytest.mark.slow
@pytest.mark.parametrize("share", RUNS)
def test_kills_lose_nothing(runs: fault_runs.Runs, share: float) -> None:
    for command, count in fault_runs.KILLS.items():
        assert not runs.kills(command, max(1, round(count * share))).wrong


@pytest.mark.slow
@pytest.mark.parametrize("share", RUNS)
def test_limits_of_memory_and_disk(runs: fault_runs.Runs, share: float) -> None:
    assert not runs.address_space(max(3, round(14 * share))).wrong
    assert not runs.full_disk(max(2, round(16 * share))).wrong


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_endings_and_races(runs: fault_runs.Runs) -> None:
    assert not runs.endings().wrong
    assert not runs.races(6).wrong
