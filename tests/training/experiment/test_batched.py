"""Batched generation against a session on the torch oracle, and the slot table with and without sinks."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from untrained import random_models

from longtake.accuracy.compare import recipe_models
from longtake.commands.main import main
from longtake.formats.recipe import recipe_named
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.session import Session
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.story import Segment
from longtake.runtime.video_model import VideoModel
from longtake.training.experiment import arithmetic
from longtake.training.experiment.batched import SINKS, Rollout, Sampling, Script
from longtake.training.experiment.classifier import DigitClassifier
from longtake.training.models.wan.slots import SlotTable, plans_of
from longtake.training.objective.chunk_pass import GraphedChunkPass, round_trip_kv

SEVEN = "a green seven drifts left over a sea background, soft light"
TWO = "a red two rises over a grey background, light from above"


def slot_plans(cuts: Sequence[bool], sinks: str = "both") -> list[tuple[tuple[int, ...], int]]:
    """For each block: the slots it reads, without its own, and the one it is written to."""
    return [(plan.table[:-1], plan.write_slot) for plan in plans_of(cuts, 4, SINKS[sinks])]


def test_both_sinks_are_the_runtime_s_table() -> None:
    for cuts in itertools.product((False, True), repeat=8):
        table = SlotTable(4)
        for cut, (read, write) in zip(cuts, slot_plans(cuts)):
            plan = table.plan(cut)
            assert (plan.table[:-1], plan.write_slot) == (read, write)
            table = plan.after


def test_without_sinks_the_oldest_block_goes() -> None:
    held = {slot: block for block, (_, slot) in enumerate(slot_plans([False] * 5, "none"))}
    assert held == {0: 4, 1: 1, 2: 2, 3: 3}


def test_shot_sink_alone_keeps_the_shot_s_first_block() -> None:
    cuts = [False, False, True] + [False] * 6
    slots: dict[int, int] = {}
    for block, (read, write) in enumerate(slot_plans(cuts, "shot")):
        seen = {slots[slot] for slot in read}
        slots[write] = block
    assert seen == {2, 6, 7}
    for block, (read, write) in enumerate(slot_plans(cuts, "global")):
        seen = {slots[slot] for slot in read} if block else set()
        slots[write] = block
    assert seen == {0, 6, 7}


def test_a_story_s_cache_does_not_depend_on_the_others() -> None:
    kv = torch.randn(3, 2, 8, 2, 32) * torch.tensor([1.0, 30.0, 0.01]).view(-1, 1, 1, 1, 1)
    alone = torch.cat([round_trip_kv(story[None]) for story in kv])
    assert torch.equal(round_trip_kv(kv), alone) and not torch.equal(alone, kv)


@pytest.mark.parametrize(("name", "cache"), [("tiny_bf16_sm90", "bf16"), ("tiny_nvfp4_sm120", "nvfp4")])
def test_equals_a_session_story_by_story(name: str, cache: str, small_preset: SimpleNamespace) -> None:
    recipe = recipe_named(name)
    plain = random_models(small_preset, seed=1)  # type: ignore[arg-type]
    backend = TorchBackend(replace(recipe, precision="bf16"), copy.deepcopy(plain))
    tokenize = lambda texts, length: plain.text.tokenize(texts)  # noqa: E731
    cuts = ([False, False, True, False, False, True], [False, True, False, False, False, False])
    scripts = [
        Script(tuple(("The scene transitions. " if c else "") + text for c in story), tuple(story), seed)
        for seed, (story, text) in enumerate(zip(cuts, (SEVEN, TWO)))
    ]
    models = recipe_models(plain, "bf16")
    sampling = Sampling(steps=2, guidance=2.0, cache=cache)
    got = torch.cat(list(Rollout(models, scripts, sampling, torch.device("cpu"))), 1)
    for row, (script, text) in enumerate(zip(scripts, (SEVEN, TWO))):
        segments = tuple(Segment(text, 1, cut) for cut in script.cuts)
        options = SessionOptions(seed=script.seed, steps=2, guidance=2.0, decode=False)
        session = Session(VideoModel(backend), tokenize, segments, options)
        wanted = torch.cat([chunk.latents for chunk in session], 1)
        error = (got[row] - wanted[0]).abs().max() / wanted.abs().max()
        # A K/V value near a rounding boundary of E2M1 may fall to the other side: fp32 sums in another order.
        assert error < (1e-4 if cache == "bf16" else 0.05), error


def test_given_chunks_are_kept_and_seen(small_preset: SimpleNamespace) -> None:
    models = random_models(small_preset, seed=1)  # type: ignore[arg-type]
    script, sampling = Script((SEVEN,) * 2, (False,) * 2), Sampling(steps=2, cache="bf16")
    plain = list(Rollout(models, [script], sampling, torch.device("cpu")))
    again = list(Rollout(models, [script], sampling, torch.device("cpu"), plain[0]))
    assert torch.equal(again[0], plain[0]) and torch.allclose(again[1], plain[1], atol=1e-5)
    other = list(Rollout(models, [script], sampling, torch.device("cpu"), plain[0] + 1))
    assert torch.equal(other[0], plain[0] + 1) and not torch.allclose(other[1], plain[1], atol=1e-3)


def test_committed_chunks_are_seen_in_place_of_generated_ones(small_preset: SimpleNamespace) -> None:
    models, cpu = random_models(small_preset, seed=1), torch.device("cpu")  # type: ignore[arg-type]
    script, sampling = Script((SEVEN,) * 3, (False,) * 3), Sampling(steps=2, cache="bf16")
    plain = list(Rollout(models, [script], sampling, cpu))
    same = list(Rollout(models, [script], sampling, cpu, committed=torch.cat(plain, 1)))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, same, strict=True))
    other = list(Rollout(models, [script], sampling, cpu, committed=torch.cat(plain, 1) + 1))
    assert torch.equal(other[0], plain[0]) and not torch.allclose(other[1], plain[1], atol=1e-3)


def test_fp8_attention_is_near_the_exact_one_and_not_it(small_preset: SimpleNamespace) -> None:
    models, cpu = random_models(small_preset, seed=1), torch.device("cpu")  # type: ignore[arg-type]
    script = Script((SEVEN,) * 3, (False,) * 3)
    exact, rounded = (
        torch.cat(list(Rollout(models, [script], Sampling(steps=2, cache="bf16", attention=attention), cpu)), 1)
        for attention in ("bf16", "fp8")
    )
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.05


@pytest.mark.slow
def test_the_arithmetics_command_compares_with_the_first_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = DigitClassifier().eval()
    monkeypatch.setattr(arithmetic, "judge_from", lambda path, device: judge)
    rows = ["bf16", "fp32", "4-bit cache, fp8 attention"]
    asked = [
        "--stories",
        "2",
        "--ssim-stories",
        "1",
        "--chunks",
        "2",
        "--batch",
        "1",
        "--steps",
        "1",
        "--guidance",
        "1",
    ]
    assert main(["experiment", "arithmetic", *asked, "--json", str(tmp_path / "f.json"), "--rows", *rows]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert list(found["rows"]) == rows and found["steps"] == 1 and found["device"]
    first, same, eight = (found["rows"][name] for name in rows)
    assert "ssim" not in first and len(first["fidelity_by_story"]) == 2
    # A CPU computes in fp32 anyway, so the second row is the first.
    assert same["difference"] == 0 and min(same["ssim_by_chunk"]) == pytest.approx(1) or torch.cuda.is_available()
    assert 0.5 < eight["ssim_lowest"] < 0.99999 and len(eight["ssim_by_chunk"]) == 2 and eight["ssim_stories"] == 1
    assert "1 steps, guidance 1" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize(("cache", "attention", "tolerance"), [("bf16", "bf16", 1e-3), ("nvfp4", "fp8", 3e-2)])
def test_cuda_graphs_generate_the_same(
    small_preset: SimpleNamespace, cache: str, attention: str, tolerance: float
) -> None:
    """Six chunks, so that slots are read and written over; two stories with cuts in different places."""
    models, gpu = random_models(small_preset, seed=1), torch.device("cuda")  # type: ignore[arg-type]
    for module in (models.dit, models.text):
        module.to(gpu)
    scripts = [Script((SEVEN,) * 6, (False,) * 6, 1), Script((TWO,) * 6, (False, True, False, False, True, False), 2)]
    sampling, found = Sampling(steps=3, guidance=2.0, cache=cache, attention=attention, compute="fp32"), []
    for graph in (True, False):
        rollout = Rollout(models, scripts, sampling, gpu)
        assert isinstance(rollout.passes, GraphedChunkPass)
        rollout.passes.looks.enabled = rollout.passes.writes.enabled = graph
        found.append(torch.cat(list(rollout), 1))
        assert (
            rollout.passes.looks.enabled == rollout.passes.writes.enabled == graph
            and len(rollout.passes.looks.graphs) == 4 * graph
        )
    assert (found[0] - found[1]).norm() <= tolerance * found[1].norm()


def test_captured_passes_go_with_their_owner(small_preset: SimpleNamespace) -> None:
    """Not at some later garbage collection: they hold memory of a GPU."""
    dit = random_models(small_preset, seed=1).dit  # type: ignore[arg-type]
    gc.disable()
    try:
        passes = GraphedChunkPass(dit, "bf16", torch.float32, nullcontext)
        alive = weakref.ref(passes)
        del passes
        assert alive() is None
    finally:
        gc.enable()
