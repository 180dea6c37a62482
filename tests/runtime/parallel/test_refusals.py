"""What several ranks cannot share is refused in one sentence, before a process is started or a model opened."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from longtake.chain import add_ranks
from longtake.commands.main import main
from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.bundle import Bundle
from longtake.formats.recipe import recipe_named
from longtake.machine.flavour import Flavour
from longtake.record import record_from_json
from longtake.runtime.parallel import choose
from longtake.runtime.parallel import open as opening
from longtake.runtime.parallel.follower import Opening
from longtake.runtime.parallel.open import require_devices, require_rank_plans, require_split, sharded_backend
from longtake.runtime.parallel.processes import Followers
from longtake.runtime.sources import OpenOptions, Source, backend_from_source
from longtake.training.models.presets import PRESETS, TINY, Preset

FEW_ROWS = replace(TINY, name="low", height=32, width=64)
UNEVEN = replace(TINY, name="uneven", chunk_latents=6)


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that comes too late fails the test."""

    def started(*_: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(opening, "Followers", started)


@pytest.mark.parametrize(
    ("preset", "gpus", "what", "fix"),
    [
        (TINY, 3, "3 GPUs cannot share the heads of tiny evenly", "--gpus 2 or 4"),
        (TINY, 8, "8 GPUs cannot share the heads of tiny evenly", "--gpus 2 or 4"),
        (PRESETS["wan2.2-ti2v-5b"], 3, "3 GPUs cannot share the latent frames a chunk", "--gpus 2 or 4 or 8"),
        (UNEVEN, 4, "4 GPUs cannot share the latent frames a chunk of uneven evenly", "--gpus 2"),
        (FEW_ROWS, 4, "4 GPUs cannot share the rows of low", "fewer --gpus"),
        (PRESETS["sana-wm"], 2, "a stream of sana-wm cannot be shared by several GPUs", "leave out --gpus"),
        (TINY, 0, "bad --gpus", "--gpus 2"),
    ],
    ids=["heads", "more than heads", "frames of the 5B", "frames", "rows", "family", "none"],
)
def test_a_model_that_cannot_be_cut(preset: Preset, gpus: int, what: str, fix: str) -> None:
    with pytest.raises(LongtakeError) as refused:
        require_split(preset, gpus)
    assert refused.value.what.startswith(what)
    assert refused.value.fix == fix


def test_numbers_that_divide_are_taken() -> None:
    for gpus in (2, 4, 8):
        require_split(PRESETS["wan2.2-ti2v-5b"], gpus)
    for gpus in (2, 4):
        require_split(TINY, gpus)


def test_missing_gpus_are_counted() -> None:
    with pytest.raises(UnavailableError, match=r"(?s)^4 GPUs are asked for and 2 are here.*at most 2.*--device cpu"):
        require_devices(4, None, there=2)


def test_unlike_gpus_are_named() -> None:
    kinds = ["NVIDIA H200, 139 GiB", "NVIDIA H200, 139 GiB", "NVIDIA H100, 79 GiB"]
    with pytest.raises(UnavailableError, match=r"(?s)of one kind.*H200, 139 GiB and NVIDIA H100.*cuda:2"):
        require_devices(3, None, there=3, kind=kinds.__getitem__)
    assert require_devices(2, None, there=3, kind=kinds.__getitem__) == ["cuda:0", "cuda:1"]


def test_ranks_on_the_cpu_need_no_gpu_and_one_gpu_is_not_several() -> None:
    assert require_devices(2, "cpu", there=0) == ["cpu", "cpu"]
    with pytest.raises(LongtakeError, match=r"(?s)takes the first GPUs.*--device cuda:1.*CUDA_VISIBLE_DEVICES"):
        require_devices(2, "cuda:1", there=8)


def test_the_recipe_of_a_world_is_refused_where_it_is_opened() -> None:
    with pytest.raises(LongtakeError, match="a stream of world-tiny cannot be shared"):
        sharded_backend(recipe_named("world-tiny_bf16_sm90"), None, 2, "cpu")


@pytest.mark.parametrize(
    ("asked", "decode_device", "what"),
    [
        ("fused", None, "backend fused runs on one GPU"),
        ("reference", None, "backend reference runs on one GPU"),
        ("auto", "cuda:1", "GPUs that share a stream share its VAE, too"),
    ],
)
def test_engines_and_a_decode_device_are_for_one_gpu(asked: str, decode_device: str | None, what: str) -> None:
    source = Source(recipe_named("tiny_w4a16_sm90"), Path("nowhere"), None, None)
    with pytest.raises(LongtakeError, match=what):
        backend_from_source(source, asked, "cpu", decode_device, OpenOptions(gpus=2))


def bundle_of(folder: Path, recipe: str, *plans: str) -> Path:
    """A folder of engines as far as the question goes for how many ranks they are."""
    for plan in plans:
        (folder / plan).write_text("{}")
    flavour = Flavour("tensorrt_rtx", "1.6.1", None, "a test's", "")
    Bundle.of(folder, recipe_named(recipe), flavour, folder, []).write()
    return folder


def test_engines_that_are_not_built_for_as_many_ranks(tmp_path: Path) -> None:
    engines = bundle_of(tmp_path, "tiny_w4a16_sm90", "dit.segments.json", "dit_of2.segments.json")
    require_rank_plans(engines, 2)
    source = Source(recipe_named("tiny_w4a16_sm90"), Path("nowhere"), engines, None)
    with pytest.raises(UnavailableError, match=r"(?s)are not built for 4 ranks.*--recipe tiny_w4a16_sm90 --gpus 4"):
        backend_from_source(source, "segmented", None, None, OpenOptions(gpus=4))
    with pytest.raises(UnavailableError, match=r"(?s)engines run on GPUs.*--backend torch"):
        backend_from_source(source, "segmented", "cpu", None, OpenOptions(gpus=2))
    nothing = Source(recipe_named("tiny_w4a16_sm90"), Path("nowhere"), None, None)
    with pytest.raises(UnavailableError, match=r"(?s)no engines to share.*longtake engines.*--gpus 2"):
        backend_from_source(nothing, "segmented", None, None, OpenOptions(gpus=2))


def test_what_is_taken_for_ranks_without_being_asked_for(tmp_path: Path) -> None:
    """Engines that are built for as many, else PyTorch; with PyTorch asked for, PyTorch."""
    recipe, engines = recipe_named("tiny_w4a16_sm90"), bundle_of(tmp_path, "tiny_w4a16_sm90", "dit_of2.segments.json")
    assert choose._chosen_engines(recipe, engines, "auto", None, 2) == engines
    assert choose._chosen_engines(recipe, engines, "auto", None, 4) is None
    assert choose._chosen_engines(recipe, engines, "auto", "cpu", 2) is None
    assert choose._chosen_engines(recipe, engines, "torch", None, 2) is None


def test_what_a_rank_is_started_with_survives_the_way_to_it(tmp_path: Path) -> None:
    recipe = replace(recipe_named("tiny_w4a16_sm90"), vae_ops="library")
    first = Opening(recipe, None, 1, 2, "cuda:1", 29500, 120.0, 0, "", str(tmp_path), ("context", "dit"), True)
    assert record_from_json(Opening, json.loads(json.dumps(first.as_json()))).as_json() == first.as_json()


def test_fused_engines_are_no_ranks(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"(?s)^backend fused runs on one GPU.*mode: segmented"):
        require_rank_plans(bundle_of(tmp_path, "tiny_nvfp4_sm120", "dit_of2.segments.json"), 2)
    with pytest.raises(UnavailableError, match="backend fused runs on one GPU"):
        add_ranks(recipe_named("tiny_nvfp4_sm120"), tmp_path, 2)
    with pytest.raises(LongtakeError, match="3 GPUs cannot share the heads of tiny evenly"):
        add_ranks(recipe_named("tiny_w4a16_sm90"), tmp_path, 3)


def test_the_command_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a red two", "--gpus", "0"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"bad --gpus\n  got: 0\n  expected: 1 or more", said)
    assert "Traceback" not in said


def test_a_rank_that_cannot_start_says_why() -> None:
    """A process of its own that finds no such recipe in its first line."""
    followers = Followers([{"rank": 1}])
    with pytest.raises(
        UnavailableError, match=r"(?s)a rank could not be started.*rank 1 has ended: TypeError: no 'recipe'"
    ):
        followers.require_ready(120)
