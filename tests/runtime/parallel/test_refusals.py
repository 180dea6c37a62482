"""What several ranks cannot share is refused in one sentence, before a process is started or a model opened."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from longtake.commands.main import main
from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.recipe import recipe_named
from longtake.runtime.parallel import open as opening
from longtake.runtime.parallel.open import require_devices, require_split, sharded_backend
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
