"""One stream on two and four ranks is the stream of one: velocity, cache codes, frames, snapshots; and what a loss says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_here import BUILDS

from longtake.chain import HowToExport, add_ranks, build, export
from longtake.engines.build import require_buildable
from longtake.formats.recipe import recipe_named
from longtake.machine.flavour import flavour_for, gpu_compute_capability
from longtake.paths import REPOSITORY

_spec = importlib.util.spec_from_file_location("ranks_at_work", Path(__file__).parent / "ranks_at_work.py")
assert _spec and _spec.loader
ranks_at_work: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks_at_work)
LIBRARY = REPOSITORY / "docs" / "recipes_library"
RUNS = {
    "2 ranks": ((2, "cpu"), [pytest.mark.slow]),
    "4 ranks": ((4, "cpu"), [pytest.mark.slow]),
    "2 GPUs": ((2, "cuda"), [pytest.mark.gpu, pytest.mark.slow]),
    "2 GPUs on engines": ((2, "tiny_w4a16_sm90"), [pytest.mark.gpu, pytest.mark.slow, BUILDS]),
    "2 GPUs on engines, by rows": (
        (2, f"{LIBRARY}/tiny_fp8_library_sm90.yaml"),
        [pytest.mark.gpu, pytest.mark.slow, BUILDS],
    ),
    "2 GPUs on engines, codes by rows": (
        (2, f"{LIBRARY}/tiny_fp8_conv8_sm90.yaml"),
        [pytest.mark.gpu, pytest.mark.slow, BUILDS],
    ),
}
PARAMS = [pytest.param(run, marks=marks, id=name) for name, (run, marks) in RUNS.items()]


@pytest.fixture(scope="module", params=PARAMS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process found that leads so many ranks."""
    ranks, device = request.param
    if device != "cpu" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs: {torch.cuda.device_count()} are here")
    place = tmp_path_factory.mktemp("ranks")
    if device in ("cpu", "cuda"):
        result = ranks_at_work.started(ranks, place, device)
    else:
        result = ranks_at_work.started(ranks, place, "cuda", engines_of_ranks(device, ranks, place))
        assert result["by rows"] == device.startswith(str(LIBRARY))
        device = "engines"
    return {**result, "ranks": ranks, "device": device}


def engines_of_ranks(name: str, ranks: int, place: Path) -> Path:
    """The shipped model's engines by a recipe, those of a rank among them."""
    recipe, machine = recipe_named(name), gpu_compute_capability()
    flavour = flavour_for(machine)
    require_buildable(recipe, flavour, machine)
    export(recipe, None, place / "onnx", HowToExport(parity=False))
    add_ranks(recipe, place / "onnx", ranks)
    build(recipe, place / "onnx", place / "engines", flavour, machine)
    return place / "engines"


def most(found: dict[str, Any], on_cpu: float, on_gpu: float, on_engines: float) -> float:
    """A bound where the device's products are fp32, may be rounded to TF32, or are bf16's."""
    return {"cpu": on_cpu, "cuda": on_gpu, "engines": on_engines}[found["device"]]


def test_a_pass_has_the_velocity_of_one_rank(found: dict[str, Any]) -> None:
    for commit in (False, True):
        assert found[f"velocity, commit {commit}"] <= most(found, 1e-5, 1e-3, 1e-2), found
        assert found[f"again, commit {commit}"] <= most(found, 0, 1e-3, 0), found


def test_passes_with_their_exchanges_are_captured(found: dict[str, Any]) -> None:
    """One CUDA graph for passes that read and one for those that write, at least."""
    if found["device"] != "engines":
        pytest.skip("PyTorch's passes are launched one by one")
    assert found["graphs"] >= 2, found


def test_the_cache_is_split_by_heads_and_has_the_codes_of_one_rank(found: dict[str, Any]) -> None:
    assert found["own heads"] * found["ranks"] == found["all heads"]
    assert found["written"] > 0.1
    assert found["codes values"] >= 0.999 and found["codes scales"] >= 0.999
    assert found["amax"] <= most(found, 1e-5, 1e-3, 1e-2)  # of sums in another order


def test_the_decoder_gives_the_frames_of_one_rank(found: dict[str, Any]) -> None:
    """Six latent rows: on four ranks they are not shared evenly."""
    on_cpu = found["device"] == "cpu"
    assert found["frames"] <= (0.1 if on_cpu else 1.0), "of 255"
    assert found["decoder caches"] <= (1e-4 if on_cpu else 1e-2)


def test_a_state_is_loaded_and_read_back_whole(found: dict[str, Any]) -> None:
    assert found["loaded"] == 1.0


def test_a_video_on_several_ranks_is_that_of_one(found: dict[str, Any]) -> None:
    """Under guidance and across a cut. A sum in another order may tip a 4-bit code, and what reads it differs by more."""
    assert len(found["chunks"]) == 3 and found["chunks"][0] <= most(found, 1e-4, 1e-2, 3e-2), found
    assert min(found["ssim of chunks"]) >= found["gate"]["ssim"], found


def test_a_saved_session_goes_on_on_one_rank_and_back(found: dict[str, Any]) -> None:
    """From a file of several ranks on one and on several, from a file of one rank likewise: inside the gate of a pass."""
    assert len(found["hops"]) == 2 and max(found["hops"]) <= found["gate"]["dit"], found
    assert min(found["ssim of hops"]) >= found["gate"]["ssim"], found


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
    assert lost["resumed"] <= most(found, 1e-2, 1e-2, 3e-2)


def test_a_checkpoint_in_bf16_is_shared_too(found: dict[str, Any]) -> None:
    """Through `Generator.from_checkpoint`, with a 16-bit cache; after the process has lost four ranks before."""
    if found["ranks"] == 2:
        pytest.skip("told by the process that led four")
    rounded = found["rounded"]
    assert rounded["dtype"] == "torch.bfloat16"
    assert rounded["latents"] <= 1e-2 and rounded["cache"] <= 1e-2 and rounded["ssim"] >= 0.98, rounded
