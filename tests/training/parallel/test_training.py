"""`longtake train` on two ranks leaves what it leaves on one, stopped and resumed or not."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.training.parallel.ranks import Ranks, join_ranks
from longtake.training.parallel.stage import ParallelDiTStage
from longtake.training.stages.dit import DiTStage
from longtake.training.trainer import Trainer

_spec = importlib.util.spec_from_file_location("workers", Path(__file__).parent / "workers.py")
assert _spec and _spec.loader
workers: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)


CPU = torch.device("cpu")


@pytest.mark.slow
def test_two_ranks_leave_what_one_leaves(tmp_path: Path, vae_folder: Path) -> None:
    shutil.copytree(vae_folder, tmp_path / "vae")
    found = workers.started("training", 2, tmp_path)["resumed"]
    alone, many = tmp_path / "alone", tmp_path / "run"
    metrics = Trainer(DiTStage(workers.options(tmp_path)), workers.config(alone), CPU).fit()
    assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    for name in ("dit", "text_encoder"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (many, alone))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.allclose(ours[key], tensor, rtol=1e-4, atol=2e-6), (name, key)
    left = {path.name for path in alone.iterdir()} | {"resume-0000001.safetensors", "resume-0000001.json"}
    assert {path.name for path in many.iterdir()} == left
    resume, wanted = (load_file(folder / "resume-0000002.safetensors") for folder in (many, alone))
    assert resume.keys() == wanted.keys() and all(resume[key].shape == x.shape for key, x in wanted.items())
    one, other = (read_json(folder / "dit.json")["amax"] for folder in (many, alone))
    assert one.keys() == other.keys()
    for linear, sides in other.items():
        for side, value in sides.items():
            assert one[linear][side] == pytest.approx(value, rel=1e-3), (linear, side)


@pytest.mark.slow
def test_two_ranks_train_under_nvfp4_and_recycle_errors(tmp_path: Path, vae_folder: Path) -> None:
    """Rounding to 4 bits, or errors to bf16, turns a difference in the last bits into a small one."""
    shutil.copytree(vae_folder, tmp_path / "vae")
    found = workers.started("special", 2, tmp_path)
    for name, more in workers.SPECIAL.items():
        alone, many = tmp_path / f"alone-{name}", tmp_path / name
        metrics = Trainer(DiTStage(workers.options(tmp_path, **more)), workers.config(alone), CPU).fit()
        assert found[name]["loss"] == pytest.approx(metrics["loss"], rel=1e-2), name
        ours, theirs = (load_file(folder / "dit.safetensors") for folder in (many, alone))
        for key, tensor in theirs.items():
            # AdamW's first steps are all of one size: a gradient near zero may turn the other way
            assert (ours[key] - tensor).norm() <= 0.1 * tensor.norm() + 1e-2, (name, key)
    one, other = (load_file(tmp_path / f"{kind}nvfp4/resume-0000002.safetensors") for kind in ("", "alone-"))
    amax = [key for key in other if key.endswith("weight_quantizer._amax")]
    assert amax and all(torch.allclose(one[key], other[key], rtol=1e-2) for key in amax)
    # Activations are measured on the last clean chunk, too, which one rank leaves out: amax may be larger
    for key in other:
        if key.endswith("input_quantizer._amax"):
            assert 0.97 * other[key] <= one[key] <= 2 * other[key], key


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
