"""The run report: every figure comes with the conditions it holds for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longtake import provenance
from longtake.runtime.meter import Meter
from longtake.runtime.report import Report, conditions_of_run, table, write_report

REQUIRED = {
    "kind", "command", "commit", "date", "preset", "recipe", "backend", "gpu", "versions", "resolution", "steps",
    "chunk_latents", "window_latents", "fps", "first_chunk_s", "stage_ms", "peak_gb", "against", "ratio",
}  # fmt: skip


def some_report(toy: Any, meter: Meter) -> Report:
    return Report(kind="generate", steps=4, guidance=1.0, seed=0, **conditions_of_run(toy), **meter.figures())


def test_fields(toy: Any, tmp_path: Path) -> None:
    write_report(some_report(toy, Meter()), tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())
    assert set(written) >= REQUIRED
    assert written["peak_gb"] == 0.123 and written["peak_of"].startswith("resident memory") and written["gpu"] is None
    assert written["fps"] == {"dit": None, "vae": None, "end_to_end": None} and written["first_chunk_s"] is None


def test_frame_rates_add_up(toy: Any, make_generator: Any) -> None:
    """DiT and VAE rates follow from the stage times; end to end is no faster than the slower of the two."""
    with make_generator(toy).session(["x"] * 4, steps=2, guidance=1.0) as session:
        meter = Meter()
        chunks = list(session)
        for chunk in chunks:
            meter.add(chunk)
    frames = 29 + 3 * 32
    dit = sum(chunk.timings[stage] for chunk in chunks for stage in ("conditions", "denoise", "clean"))
    vae = sum(chunk.timings["decode"] for chunk in chunks)
    fps = meter.fps()
    assert fps["dit"] == pytest.approx(1e3 * frames / dit, rel=1e-3)
    assert fps["vae"] == pytest.approx(1e3 * frames / vae, rel=1e-3)
    assert fps["end_to_end"] is not None and fps["end_to_end"] <= min(fps["dit"], fps["vae"]) * 1.001  # type: ignore
    assert meter.figures()["frames"] == frames and 0 < meter.first_chunk_s <= frames / fps["end_to_end"]  # type: ignore


def test_the_table_names_the_conditions(toy: Any) -> None:
    text = table(some_report(toy, Meter()))
    for part in ("toy: made for tests", "tiny_bf16_sm90", "128x128", "4 steps", "0.12 GB resident memory"):
        assert part in text


def test_commit_is_that_of_the_checkout() -> None:
    done = subprocess.run(
        ["git", "-C", str(provenance.REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    head = done.stdout.strip() if done.returncode == 0 else ""
    assert (provenance.commit() or "").removesuffix("-dirty") == head


def test_no_commit_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    assert provenance.commit() is None


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/longtake/__main__.py", "generate", "--prompt", "a red one"])
    assert provenance.command_line() == "longtake generate --prompt 'a red one'"
