from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from longtake.commands.main import main
from longtake.training.models.wan.window import full_history
from longtake.training.parallel.bench.runs import KEPT_FREE, longest_fitting, next_trial
from longtake.training.parallel.bench.worker import thinned
from longtake.training.parallel.launch import run_ranks
from longtake.training.parallel.layout import Layout


def test_a_rehearsal_attends_to_as_much_at_most_and_to_less_in_all() -> None:
    seen = Layout("balanced", 4, 2).seen(full_history(4))
    thin = thinned(seen)
    assert max(map(len, thin)) == max(map(len, seen)) and sum(map(len, thin)) < sum(map(len, seen))
    assert [bool(keys) for keys in thin] == [bool(keys) for keys in seen]


def test_the_longest_clip_is_where_a_line_through_two_peaks_meets_the_memory() -> None:
    points = [(16.0, 20e9), (32.0, 30e9)]
    assert longest_fitting(points, 50e9 + KEPT_FREE) == pytest.approx(64.0)
    assert longest_fitting(points[:1], 50e9) is None


def test_the_search_starts_at_the_promise_and_stops_when_the_answer_is_known() -> None:
    known = {"fits_s": 32.0, "fails_s": None, "why": None, "estimated_s": 70.0}
    assert next_trial(known, 96) == 64
    assert next_trial({**known, "fits_s": 63.96}, 96) == 72
    assert next_trial({**known, "fits_s": 63.96, "fails_s": 71.96, "why": "out of memory"}, 96) is None
    assert next_trial({**known, "fails_s": 63.96, "why": "out of memory"}, 96) == 56


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    code = "import os, time\nif os.environ['RANK'] == '1': raise RuntimeError('out of memory')\ntime.sleep(60)"
    start = time.monotonic()
    assert run_ranks(["-c", code], 2, tmp_path, start + 50) == "out of memory"
    assert time.monotonic() - start < 20


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    why = run_ranks(["-c", "import time; time.sleep(60)"], 2, tmp_path, time.monotonic() + 0.5)
    assert why == "not done in the time it was given"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # ranks share the cores with other tests
def test_a_mode_that_runs_out_of_memory_costs_its_own_row_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    words = "--nproc 2 --preset tiny --device cpu --layers 1 --seconds 2 --iterations 1 --rehearse-oom naive".split()
    words += ["--budget-seconds", "900"]
    assert main(["bench", "parallel", *words, "--out", str(tmp_path / "bench.json")]) == 0
    rows = {row["mode"]: row for row in json.loads((tmp_path / "bench.json").read_text())["cases"]}
    assert rows["naive"]["failed"] == "out of memory"
    assert rows["balanced"]["s_per_iteration"] > 0 and rows["none"]["iterations"] == 1
    assert "| naive |" in capsys.readouterr().out
