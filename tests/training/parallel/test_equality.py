"""Loss, velocity and gradients of two and four ranks are those of one: fp32, 1e-5."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("workers", Path(__file__).parent / "workers.py")
assert _spec and _spec.loader
workers: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_ranks_equal_one(ranks: int, tmp_path: Path) -> None:
    """Both modes, all history and the window with cuts, given and padding frames; on four ranks also two groups that
    share a batch, and two hosts that replicate the weights."""
    found = workers.started("equality", ranks, tmp_path)
    assert len(found) == (4 if ranks == 2 else 12)
    for case, errors in found.items():
        assert errors["velocity"] <= 1e-5, (case, errors)
        assert max(errors["losses"]) <= 1e-5, (case, errors)
        assert errors["gradients"] <= 1e-5, (case, errors)
        assert errors["largest"] <= 1e-5, (case, errors)
