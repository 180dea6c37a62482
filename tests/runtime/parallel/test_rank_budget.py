"""The memory of ranks: what one of them allocates, refused before a process is started, and shown by `longtake budget`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from untrained import random_models

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.formats.memory import KEPT_WINDOWS, MEASURED, Budget, RecordedTerm, Use
from longtake.formats.plan import PlanManifest
from longtake.formats.recipe import recipe_named
from longtake.formats.segmented_graph import Segment, SegmentedGraph, Step, TensorType
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.budget import check
from longtake.runtime.budget.use import budget_of
from longtake.runtime.parallel import choose
from longtake.runtime.parallel import open as opening
from longtake.runtime.parallel.comm import Comm
from longtake.runtime.parallel.rank import RankBackend
from longtake.runtime.sources import OpenOptions, Source, backend_from_source

TINY = recipe_named("tiny_w4a16_sm90")
LARGE = recipe_named("wan2.2-ti2v-5b_fp8_sm90")
GB = 10**9


def terms(budget: Budget) -> dict[str, int]:
    return {term.name: term.bytes for term in budget.terms}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ranks_cache_is_what_it_allocates(ranks: int) -> None:
    """4-bit codes of its heads; what is fp32 in it counts as such on both sides."""
    backend = RankBackend(
        TorchBackend(TINY, models=random_models(TINY.model)), Comm(0, ranks, torch.device("cpu"), 1.0)
    )
    allocated = sum(t.nbytes for t in backend.new_state("dit").tensors.values())
    assert terms(budget_of(TINY, Use(ranks=ranks)))["K/V cache"] == allocated


def test_each_further_rank_takes_less_and_weights_stay() -> None:
    one, two, four = (budget_of(LARGE, Use(ranks=ranks)) for ranks in (1, 2, 4))
    shrinking = ("K/V cache", "VAE caches", "DiT working memory", "VAE working memory")
    for name in shrinking:
        assert terms(one)[name] > terms(two)[name] > terms(four)[name] > terms(one)[name] / 6, name
        assert terms(two)[name] < 0.68 * terms(one)[name], name
    assert terms(two)["K/V cache"] == pytest.approx(terms(one)["K/V cache"] / 2, rel=1e-4)  # an amax is every rank's
    for name in ("weights, dit", "weights, VAE decoder", "prompts' K/V and embeddings"):
        assert terms(one)[name] == terms(two)[name]
    assert "communicator" in terms(two) and "communicator" not in terms(one)
    assert two.apart == one.apart  # the first rank has the encoders


def test_each_rank_unpacks_whole_weights_for_a_library() -> None:
    """One at a time, the largest beside its share of the FFN's inner tensor: more than its share of the window is."""
    packed, model = recipe_named("wan2.2-ti2v-5b_w4a16_sm90"), LARGE.model
    (one, four), (_, packed_four) = (
        [terms(budget_of(recipe, Use(ranks=ranks)))["DiT working memory"] for ranks in (1, 4)]
        for recipe in (LARGE, packed)
    )
    window = 4 * model.window_chunks * model.chunk_tokens * model.dit.dim // 4
    inner = 2 * model.chunk_tokens * model.dit.ffn_dim // 4
    assert packed_four - four == inner + 2 * model.dit.dim * model.dit.ffn_dim - window > 0
    assert one == terms(budget_of(packed))["DiT working memory"]  # where the window is the larger


def test_a_decoder_that_is_not_cut_is_the_first_ranks_alone() -> None:
    recipe = replace(LARGE, vae_ops="engine")
    one, two = (terms(budget_of(recipe, Use(ranks=ranks))) for ranks in (1, 2))
    assert one["VAE caches"] == two["VAE caches"] and one["VAE working memory"] == two["VAE working memory"]


def test_what_one_gpu_recorded_or_measured_says_nothing_of_ranks(tmp_path: Path) -> None:
    recorded = (RecordedTerm("K/V cache", 7, "exact"),)
    assert terms(budget_of(LARGE, Use(recorded=recorded)))["K/V cache"] == 7
    assert terms(budget_of(LARGE, Use(recorded=recorded, ranks=2)))["K/V cache"] > GB
    (tmp_path / MEASURED).write_text("{}")
    assert budget_of(LARGE, Use(engines=tmp_path, ranks=2)).total() > GB


def test_exchanges_of_built_parts_are_in_the_arena(tmp_path: Path) -> None:
    """What travels needs its tensors once more while it does."""
    million = TensorType("bf16", (1 << 19, 1, 1))  # a megabyte
    names = ("latents", "q", "k", "v", "qa", "ka", "va", "velocity")
    for network, exchanged in (("dit", False), ("dit_of2", True)):
        steps = [Step("segment", "one", ("latents",), ("q", "k", "v"))]
        if exchanged:
            steps.append(Step("exchange", "gather_tokens", ("q", "k", "v"), ("qa", "ka", "va")))
        last = ("qa", "ka", "va") if exchanged else ("q", "k", "v")
        steps.append(Step("segment", "two", last, ("velocity",)))
        segments = (
            Segment("one", ("x",), ("a", "b", "c"), {n: million for n in "xabc"}),
            Segment("two", ("a", "b", "c"), ("x",), {n: million for n in "xabc"}),
        )
        graph = SegmentedGraph(
            network, ("latents",), ("velocity",), (), {n: million for n in names}, segments, tuple(steps)
        )
        graph.write(tmp_path / f"{network}.segments.json")
    for plan in ("one", "two"):
        manifest = PlanManifest(f"{plan}.plan", plan, "", 0, "", "", "", "", {}, {}, "", "", scratch_bytes=0)
        manifest.write(tmp_path / f"{plan}.plan")
    one, two = (terms(budget_of(TINY, Use(engines=tmp_path, ranks=ranks)))["DiT working memory"] for ranks in (1, 2))
    assert one == pytest.approx(3 << 20, abs=1 << 12)  # q, k and v
    assert two == pytest.approx(9 << 20, abs=1 << 12)  # as they come, as they go, and staged


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes of each, which a test may change; a process that is started fails it."""
    free = {"cuda:0": 100 * GB, "cuda:1": 100 * GB}
    monkeypatch.setattr(check, "free_memory", lambda device: (str(device), free[str(device)]))
    monkeypatch.setattr(opening, "require_devices", lambda gpus, device: list(free))
    monkeypatch.setattr(opening, "require_rank_plans", lambda *words: None)
    monkeypatch.setattr(choose, "require_rank_plans", lambda *words: None)

    class Started(Exception):
        pass

    def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(opening, "_store", start)
    monkeypatch.setattr(opening, "Followers", start)
    opening.Started = Started  # type: ignore[attr-defined]
    return free


def test_every_ranks_memory_is_asked_before_one_is_started(two_gpus: dict[str, int], tmp_path: Path) -> None:
    said: list[Budget] = []
    source = Source(LARGE, tmp_path, tmp_path, None)
    options = OpenOptions(gpus=2, announce=said.append, guided=False)
    with pytest.raises(opening.Started):  # type: ignore[attr-defined]
        backend_from_source(source, "auto", None, opening=options)
    assert said[0].ranks == 2 and KEPT_WINDOWS not in terms(said[0])
    two_gpus["cuda:1"] = 5 * GB
    with pytest.raises(LongtakeError) as refused:
        backend_from_source(source, "auto", None, opening=options)
    text = str(refused.value)
    assert "does not fit the memory of cuda:1" in text and "5.00 GB free" in text and "--decode-device" not in text


def test_the_command_prints_what_a_rank_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["budget", "--recipe", LARGE.name, "--guidance", "1"]
    assert main([*words, "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "on the first of 2 GPUs that share a video" in out and "communicator" in out
    assert main([*words, "--gpus", "2", "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert shown["total_gb"] < 16 and "communicator" in {term["name"] for term in shown["terms"]}


@pytest.mark.parametrize(
    "words, said",
    [
        (("--recipe", "wan2.2-ti2v-5b_fp8_sm90", "--gpus", "3"), "3 GPUs cannot share the latent frames"),
        (("--recipe", "sana-wm_bf16_sm90", "--gpus", "2"), "a stream of sana-wm cannot be shared"),
        (("--recipe", "tiny_nvfp4_sm120", "--gpus", "2"), "backend fused runs on one GPU"),
        (("--recipe", "tiny_bf16_sm90", "--gpus", "2", "--decode-device", "cuda:1"), "share its VAE, too"),
        (("--recipe", "tiny_bf16_sm90", "--gpus", "0"), "--gpus"),
    ],
)
def test_what_cannot_be_shared_has_no_budget(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["budget", *words]) != 0
    assert said in capsys.readouterr().err
