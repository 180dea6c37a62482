"""What the checks cost is counted, and is little (check_cost.py)."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from longtake.formats import exported

_spec = importlib.util.spec_from_file_location("check_cost", Path(__file__).with_name("check_cost.py"))
assert _spec and _spec.loader
check_cost = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_cost)


def test_a_check_that_takes_long_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path) -> str:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        return ""

    monkeypatch.setattr(exported, "sha256", slow)
    with check_cost.Meter() as meter:
        exported.sha256(tmp_path)
    assert meter.spent[check_cost.OLDER] >= 0.05 and exported.sha256 is slow
    assert not check_cost.held({"opening": {"percent": 1.5}}) and check_cost.held({"opening": {"percent": 0.5}})


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_checks_cost_little(export: Path) -> None:
    """A hundredth of opening the tiny model, which takes a second, and of its chunks; other work may disturb some runs."""
    told = [check_cost.measure(export, "reference") for _ in range(4)][1:]  # the first one imports
    for part in told[0]:
        assert any(check_cost.held({part: each[part]}) for each in told), told
