"""One stream on two and four ranks is the stream of one: velocity, cache codes, frames, snapshots; and what a loss says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("ranks_at_work", Path(__file__).parent / "ranks_at_work.py")
assert _spec and _spec.loader
ranks_at_work: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks_at_work)
RANKS = (2, pytest.param(4, marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=RANKS, ids=["2 ranks", "4 ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process found that leads so many ranks."""
    result: dict[str, Any] = ranks_at_work.started(request.param, tmp_path_factory.mktemp("ranks"))
    return {**result, "ranks": request.param}


def test_a_pass_has_the_velocity_of_one_rank(found: dict[str, Any]) -> None:
    for commit in (False, True):
        assert found[f"velocity, commit {commit}"] <= 1e-5, found


def test_the_cache_is_split_by_heads_and_has_the_codes_of_one_rank(found: dict[str, Any]) -> None:
    assert found["own heads"] * found["ranks"] == found["all heads"]
    assert found["written"] > 0.1
    assert found["codes values"] >= 0.999 and found["codes scales"] >= 0.999
    assert found["amax"] <= 1e-5  # fp32, of sums in another order


def test_the_decoder_gives_the_frames_of_one_rank(found: dict[str, Any]) -> None:
    """Six latent rows: on four ranks they are not shared evenly."""
    assert found["frames"] <= 0.1, "of 255"
    assert found["decoder caches"] <= 1e-4


def test_a_state_is_loaded_and_read_back_whole(found: dict[str, Any]) -> None:
    assert found["loaded"] == 1.0


def test_a_video_moves_between_one_rank_and_several(found: dict[str, Any]) -> None:
    """Chunks 0 and 1 on several, 2 on one, 3 on several, under guidance and across a cut, inside the gate of `longtake
    check`. Where a sum in another order tips a 4-bit code, chunks that read it differ by more than a pass does."""
    assert len(found["chunks"]) == 4 and found["chunks"][0] <= 1e-4, found
    assert max(found["chunks"]) <= found["gate"]["dit"], found
    assert min(found["ssim"]) >= found["gate"]["ssim"], found


def test_tensors_that_nobody_holds_are_forgotten(found: dict[str, Any]) -> None:
    """The prompts' contexts and the times of two sessions at most."""
    assert found["sent"] < 100


def test_a_lost_rank_is_named_and_the_saved_session_goes_on(found: dict[str, Any]) -> None:
    lost = found["lost"]
    first, second = lost["said"]
    assert f"the {found['ranks']} ranks that share this video have lost each other" in first
    expected = "rank 1 has ended: exit code -9" if found["ranks"] == 2 else "3 within 1 s"
    assert expected in first and "--load-session" in first
    assert second == first
    assert all(lost["ended"])
    assert lost["took"] < 60
    assert lost["resumed"] <= 1e-2
