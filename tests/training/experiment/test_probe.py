"""Where attention falls when a subject returns: by role, by layer, and what the tables make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from untrained import random_models

from longtake.commands.main import main
from longtake.plugins.pointwise import apply_rope
from longtake.training.data.digits import chunk_prompts
from longtake.training.data.held_out_stories import LAST, Cell, memory_stories
from longtake.training.experiment.batched import SINKS, Sampling
from longtake.training.experiment.classifier import DigitClassifier
from longtake.training.experiment.evaluate import Eyes
from longtake.training.experiment.probe import CONDITIONS, LEVELS, ROLES, Probe, returned
from longtake.training.experiment.probe_tables import draw_probes, probe_tables
from longtake.training.models.load import Models
from longtake.training.models.presets import Preset
from longtake.training.models.wan.rope import rope_tables
from longtake.training.models.wan.slots import plans_of
from longtake.training.objective.chunk_pass import ChunkPass

CPU = torch.device("cpu")
CELL = Cell(7, 1)
CUT = CELL.chunks - LAST  # the first chunk of the return


@pytest.fixture(scope="module")
def models(small_preset: Preset) -> Models:
    return random_models(small_preset, seed=1)


def probe_of(models: Models, sinks: str) -> Probe:
    """Of two stories whose past is noise."""
    preset, stories = models.preset, memory_stories(CELL, 2)
    shape = (2, CELL.chunks * preset.chunk_latents, preset.dit.channels, *preset.latent_hw)
    data = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    eyes = Eyes(DigitClassifier(8), nn.Identity(), CPU)
    return Probe(models, stories, Sampling(LEVELS, 1.0, 5.0, "bf16", sinks), eyes, data)


@pytest.fixture(scope="module")
def looks(models: Models) -> dict[str, tuple[Tensor, Tensor]]:
    """Losses and attention of the return, by the window's sinks."""
    return {sinks: returned(probe_of(models, sinks), None) for sinks in ("both", "global", "shot", "none")}


def test_attention_falls_on_the_blocks_that_the_window_holds(looks: dict[str, tuple[Tensor, Tensor]]) -> None:
    for sinks, (losses, mass) in looks.items():
        assert losses.shape == (LAST, 2) and mass.shape == (LAST, 2, 2, len(ROLES))
        torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:-1]), rtol=0, atol=1e-5)
        held = (mass.amin((1, 2)) > 0).tolist()  # [LAST][role]
        held_at_cut, in_the_middle, at_the_end = held[0], held[1:3], held[-1]
        first, shot = sinks in ("both", "global"), sinks in ("both", "shot")
        assert held_at_cut == [first, shot, True, True], sinks
        assert at_the_end == [first, shot, True, True], sinks
        assert all(row[0] == first and row[3] for row in in_the_middle), sinks


def test_windows_differ_at_the_cut_and_in_the_last_chunk_only() -> None:
    """With both sinks and with the global one alone: what the second costs must come from these chunks, or from the past."""
    both, alone = (visible_of(sinks) for sinks in ("both", "global"))
    assert [a == b for a, b in zip(both, alone)][CUT:] == [False, True, True, False]


def visible_of(sinks: str) -> list[tuple[int, ...]]:
    """The blocks that each chunk sees."""
    _, cuts = chunk_prompts(memory_stories(CELL, 1)[0])
    return [plan.visible for plan in plans_of(cuts, 4, SINKS[sinks])]


@torch.no_grad()
def test_weighing_changes_nothing_of_what_is_predicted(models: Models) -> None:
    probe = probe_of(models, "both")
    for chunk in range(CUT):
        probe.generate(chunk)
    sample, fixed = probe.noise(CUT), probe.fixed(CUT)
    got = probe.plain.look(*probe.inputs(sample, 999), *fixed)
    plain = ChunkPass(models.dit, "bf16", torch.float32).look(*probe.inputs(sample, 999), *fixed)
    assert torch.equal(got, plain) and len(probe.weigher.masses) == models.preset.dit.layers


@torch.no_grad()
def test_keys_of_the_shot_sink_are_turned_as_if_it_stood_nearer(models: Models) -> None:
    preset, probe = models.preset, probe_of(models, "both")
    for chunk in range(CUT):
        probe.generate(chunk)
    plain = probe.fixed(CUT)
    assert all(
        torch.equal(a, b) for a, b in zip(plain, probe.nearer(plain, CUT, near=CUT))
    )  # further than it is: stays
    turned = probe.nearer(plain, CUT, near=3)
    changed = [not torch.equal(a, b) for a, b in zip(plain, turned)]
    visible = probe.plans[0][CUT].visible[:-1]
    place, start, seen = visible.index(1), 2 + preset.dit.layers, len(visible)
    assert [n for n, other in enumerate(changed) if other] == list(range(start + place, len(changed), seen))
    before, after = plain[start + place], turned[start + place]
    assert torch.equal(before[:, 1], after[:, 1])  # values have no place
    # A key at its own place, and the same key as it would be four chunks later.
    key = torch.randn(preset.chunk_tokens, preset.dit.heads, preset.dit.head_dim)
    frames = torch.arange(preset.chunk_latents, dtype=torch.float64)
    way = float((CUT - 3 - 1) * preset.chunk_latents)
    here, there = (rope_tables(preset.dit, frames + at, preset.grid_hw) for at in (8.0, 8.0 + way))
    by = rope_tables(preset.dit, [way], (1, 1))
    torch.testing.assert_close(apply_rope(apply_rope(key, *here), *by), apply_rope(key, *there), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[0, 0], apply_rope(before[0, 0], *by))


def made_up() -> dict[str, object]:
    """What `probe` returns, of one model."""
    one = {"asked": [0.3] * LAST, "told": [0.2] * LAST, "unread": 0.1, "unread_error": 0.01,
           "mass": [[[0.1, 0.2, 0.3, 0.4]] * 2] * LAST}  # fmt: skip
    return {"stories": 2, "roles": list(ROLES), **dict.fromkeys(CONDITIONS, one)}


def test_tables_and_picture(tmp_path: Path) -> None:
    text = probe_tables({"base-0": made_up()})
    assert text.count("| base-0 |") == len(CONDITIONS) and "+0.1000 ± 0.0100 | 0.100 | 0.200 | 0.300 | 0.400" in text
    draw_probes({"base-0": made_up()}, tmp_path / "probe.png")
    assert (tmp_path / "probe.png").stat().st_size > 1000 and probe_tables({}) == ""


@pytest.mark.slow
def test_the_command_on_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--stories", "1", "--distance", "1", "--device", "cpu"]
    assert (
        main(["experiment", "probe", *told, "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]) == 0
    )
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["cell"] == [1, 1] and found["checkpoints"]["tiny"]["steps"] == 10254
    assert len(found["checkpoints"]["tiny"]["both"]["mass"][0]) == 6
    assert "tiny, 10254 steps" in capsys.readouterr().out and (tmp_path / "p.png").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--distance", "1", "--between", "4"), "a chunk shows one subject"),
        (("--checkpoints", "a/part", "b/part"), "two checkpoints of one name"),
    ],
)
def test_what_cannot_be_shown_is_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str) -> None:
    assert main(["experiment", "probe", *words]) == 2
    assert says in capsys.readouterr().err
