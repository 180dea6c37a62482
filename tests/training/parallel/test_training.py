"""`longtake train` on two ranks leaves what it leaves on one, stopped and resumed or not."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longtake.runtime.errors import LongtakeError
from longtake.runtime.files import read_json
from longtake.training.parallel.ranks import Ranks, join_ranks
from longtake.training.parallel.stage import ParallelDiTStage
from longtake.training.stages.dit import DiTStage
from longtake.training.trainer import Trainer

_spec = importlib.util.spec_from_file_location("workers", Path(__file__).parent / "workers.py")
assert _spec and _spec.loader
workers: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)


def test_two_ranks_leave_what_one_leaves(tmp_path: Path, vae_folder: Path) -> None:
    shutil.copytree(vae_folder, tmp_path / "vae")
    found = workers.started("training", 2, tmp_path)
    alone = tmp_path / "alone"
    metrics = Trainer(DiTStage(workers.options(tmp_path)), workers.config(alone), torch.device("cpu")).fit()
    assert found["bf16"]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    # The other rank shows and keeps nothing but its own curve; no checkpoint of its own lies anywhere
    assert "dit.json" not in found["bf16 elsewhere"]
    for name in ("dit", "text_encoder"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path / "bf16", alone))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.allclose(ours[key], tensor, rtol=1e-4, atol=2e-6), (name, key)
    names = sorted(path.name for path in (tmp_path / "bf16").glob("*.safetensors"))
    assert set(names) == {path.name for path in alone.glob("*.safetensors")} | {"resume-0000002.safetensors"}
    resume, wanted = (load_file(folder / "resume-0000004.safetensors") for folder in (tmp_path / "bf16", alone))
    assert resume.keys() == wanted.keys() and all(resume[key].shape == x.shape for key, x in wanted.items())
    one, other = (read_json(folder / "dit.json")["amax"] for folder in (tmp_path / "bf16", alone))
    assert one.keys() == other.keys()
    for linear, sides in other.items():
        for side, value in sides.items():
            assert one[linear][side] == pytest.approx(value, rel=1e-3), (linear, side)
    under_nvfp4 = read_json(tmp_path / "nvfp4" / "dit.json")
    assert under_nvfp4["precision"] == "nvfp4" and under_nvfp4["amax"].keys() == other.keys()


@pytest.mark.parametrize(
    ("ranks", "more", "message"),
    [
        (Ranks(world=3, sequence=3), {"chunks": (3,)}, "2 heads can't be dealt out evenly to 3 ranks"),
        (Ranks(world=2, sequence=2), {"chunks": (2, 3)}, "3 chunks can't be dealt out evenly to 2 ranks"),
        (Ranks(world=8, sequence=2), {"chunks": (2,)}, "smaller than the number of sequence groups"),
    ],
)
def test_what_can_t_be_shared_is_refused_before_anything_is_made(
    ranks: Ranks, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LongtakeError, match=message):
        ParallelDiTStage(workers.options(tmp_path, **more), ranks, "balanced")


def test_a_command_without_torchrun_is_told_how() -> None:
    with pytest.raises(LongtakeError, match="torchrun --nproc-per-node 4"), join_ranks("cpu", 4):
        pass
