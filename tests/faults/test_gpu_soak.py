"""An hour of chunks on a GPU, in calls of ten minutes (gpu_soak.py). Not run yet: no GPU was at hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from longtake.files import read_json
from longtake.paths import REPOSITORY

_spec = importlib.util.spec_from_file_location("gpu_soak", Path(__file__).with_name("gpu_soak.py"))
assert _spec and _spec.loader
gpu_soak = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_soak)


def hold_together(state: Path) -> None:
    """The calls' lines are of one session."""
    told = read_json(state / "soak.json")
    rows = told["calls"]
    assert told["held"] and [row["first"] for row in rows[1:]] == [row["first"] + row["chunks"] for row in rows[:-1]]


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("calls", [pytest.param((0.5, 0.5), id="a minute"), pytest.param((9.0,) * 7, id="an hour")])
def test_an_hour_goes_on_over_saved_sessions(calls: tuple[float, ...], tmp_path: Path) -> None:
    engines = next(iter(sorted((REPOSITORY / "build").rglob("*_sm90/**/bundle.json"))), None)
    if engines is None:
        pytest.skip("no segmented engines for this GPU: longtake engines")
    for minutes in calls:
        assert gpu_soak.held(gpu_soak.soak(engines.parent, tmp_path, minutes))
    hold_together(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_second_call_goes_on_where_the_first_one_saved(export: Path, tmp_path: Path) -> None:
    """The program itself, on a CPU."""
    for _ in range(2):
        row = gpu_soak.soak(export, tmp_path / "state", 0, "reference", settled=1, steps=1)
        assert gpu_soak.held(row), row
    hold_together(tmp_path / "state")


def test_what_does_not_hold() -> None:
    good = {"nan": False, "moved": False, "same": True, "device_growth_mb": 3.0, "host_growth_mb": 99.0}
    assert gpu_soak.held(good)
    assert gpu_soak.held({**good, "device_growth_mb": 900.0, "process_growth_mb": 3.0}), "another process on the GPU"
    wrong = ({"nan": True}, {"moved": True}, {"same": False}, {"device_growth_mb": 101.0}, {"host_growth_mb": 200.0})
    for each in wrong:
        assert not gpu_soak.held({**good, **each})
    assert not gpu_soak.held({"nan": False, "moved": False, "same": True})
