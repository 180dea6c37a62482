from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longtake.commands.main import main
from longtake.training.dry_run import (
    META,
    checkpointed,
    cost_of,
    describe,
    dit_cost,
    dit_modules,
    memory_of,
    vae_modules,
)
from longtake.training.models.presets import TINY, WAN22_TI2V_5B
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.stages.vae import VAEStage


def test_a_linear_costs_what_it_must() -> None:
    with META:
        linear, x = nn.Linear(64, 32), torch.empty(10, 64)
    cost = cost_of(lambda: linear(x).square().sum(), [linear])
    forward = 2 * 10 * 64 * 32
    assert (cost.forward_flops, cost.flops) == (forward, 2 * forward)  # x needs no gradient
    assert cost.activations == 4 * (10 * 64 + 10 * 32)  # x for the weight's gradient, y for the square's


def test_a_step_grows_as_it_should() -> None:
    small = replace(TINY, dit=replace(TINY.dit, layers=2))
    modules = dit_modules(small)
    one, two = (dit_cost(small, modules, batch, 2) for batch in (1, 2))
    assert two.flops == 2 * one.flops and 1.9 < two.activations / one.activations < 2.1
    assert one.shapes["latents"] == [1, 16, 16, 8, 8]
    assert one.shapes["tokens of the transformer, [clean; noisy]"] == [1, 3 * 128, 256]
    again = checkpointed(small, one, 1, 2)
    assert again.activations < one.activations and one.flops < again.flops < 1.5 * one.flops


def learning(modules: dict[str, nn.Module]) -> int:
    return sum(p.numel() for module in modules.values() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("more", [{}, {"freeze_text": True}, {"freeze_text": True, "cache_dir": Path("kept")}])
def test_only_what_learns_has_gradients_and_moments(more: dict[str, Any]) -> None:
    small = replace(TINY, dit=replace(TINY.dit, layers=1))
    options = StageOptions(small, batch=1, chunks=(1,), **more)
    weights = learning(DiTStage(options).modules)
    assert memory_of(dit_modules(small, options.trains_text), 0)["gradients, fp32"] == 4 * weights
    text = "\n".join(describe("dit", options))
    encoder = sum(p.numel() for p in DiTStage(options).text.parameters())
    moments, frozen = 8 * weights / 1e9, 4 * encoder / 1e9
    assert f"AdamW's two moments, fp32                       {moments:10.3f} GB" in text
    assert ("text_encoder:" in text) == options.trains_text
    in_memory = f"text encoder, frozen, fp32                      {frozen:10.3f} GB" in text
    assert in_memory == (more == {"freeze_text": True})
    assert ("prompts that kept does not have yet" in text) == ("cache_dir" in more)


def test_a_decoder_alone_has_gradients_alone() -> None:
    small = replace(TINY, vae=replace(TINY.vae, encoder_dim=8, decoder_dim=8))
    kept = []
    for alone in (False, True):
        options = StageOptions(small, batch=1, decoder_only=alone)
        weights = learning(VAEStage(options).modules)
        assert memory_of(vae_modules(small, alone), 0)["gradients, fp32"] == 4 * weights
        line = next(line for line in describe("vae", options) if "activations" in line)
        kept.append(float(line.split()[-2]))
    assert kept[1] < kept[0]


def test_5b_is_described_without_allocating_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two chunks, so that it takes seconds; the arithmetic is checked against a count by hand."""
    words = ["--config", "wan2.2-ti2v-5b_bf16_ar", "--chunks", "2", "--out", str(tmp_path / "run"), "--dry-run"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["train", *words]) == 0
    text = capsys.readouterr().out
    dit = WAN22_TI2V_5B.dit
    tokens, block, width = 3 * 7040, 7040, dit.dim
    linears = 2 * tokens * dit.layers * (6 * width**2 + 2 * width * dit.ffn_dim)  # q k v o, cross-attention's q and o
    pairs = block**2 * (1 + 1 + 2)  # clean 0 to itself, noisy 0 to itself, noisy 1 to clean 0 and itself
    attention = 4 * width * (pairs + tokens * dit.text_len) * dit.layers
    least = (4 * linears + 4.5 * attention) / 1e12  # backward 2 and 2.5 times forward, which is computed twice
    told = float(text.split("a step: ")[1].split(" TFLOP")[0].replace(",", ""))
    assert least < told < 1.05 * least
    assert "dit: 4,999,787,712 parameters" in text and "[1, 16, 48, 44, 80]" in text and "nothing was trained" in text
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in kB, above what earlier tests took
    assert grown < 2e6 and not (tmp_path / "run").exists()
