"""A student from end to end by the commands that a user types: distill, export, engines, generate, check."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longtake.commands.main import main
from longtake.files import read_json
from longtake.training.models.presets import PRESETS, Preset

RECIPE = """preset: small
precision: nvfp4
cache: nvfp4
compute_capability: "12.0"
mode: fused
attention: bf16
gate: {dit: 0.10, vae: 0.03, text_encoder: 0.03, context: 0.03, ssim: 0.95}
"""
STORY = """seed: 1
shots:
  - prompt: a green seven drifts left over a dark blue background, soft light
    chunks: 1
"""


@pytest.mark.slow
def test_a_student_goes_from_end_to_end(
    tmp_path: Path,
    teacher: Path,
    small_preset: Preset,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With networks small enough for a minute; `docs/distillation.md` has the same commands for the shipped ones."""
    monkeypatch.setitem(PRESETS, small_preset.name, small_preset)

    def run(*words: str | Path | int) -> str:
        assert main([str(word) for word in words]) == 0, words
        return capsys.readouterr().out

    student, onnx, story = tmp_path / "student", tmp_path / "onnx", tmp_path / "story.yaml"
    recipe = tmp_path / "small_nvfp4_sm120.yaml"
    story.write_text(STORY)
    recipe.write_text(RECIPE)
    run("distill", "--preset", "small", "--teacher", teacher, "--vae", teacher, "--student-steps", 2, "--precision", "nvfp4", "--lora-rank", 4, "--steps", 2,
        "--lr", 1e-2, "--batch", 1, "--accumulate", 2, "--chunks", 1, "--stories", 2, "--critic-updates", 1,
        "--recalibrate", 9, "--cache-dir", tmp_path / "cache", "--device", "cpu", "--out", student)  # fmt: skip
    changed, base = load_file(student / "dit.safetensors"), load_file(teacher / "dit.safetensors")
    assert changed.keys() == base.keys(), "a LoRA is merged: the student is a plain DiT"
    assert any(not torch.equal(changed[name], base[name]) for name in base)
    run("export", "--recipe", recipe, "--checkpoints", student, "--out", onnx, "--no-parity")
    index = read_json(onnx / "small_nvfp4" / "export.json")
    assert index["amax"] == read_json(student / "dit.json")["amax"], "quantized with what was measured on the merged"
    opened = onnx / "small_nvfp4"
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        run("engines", "--recipe", recipe, "--onnx", onnx, "--out", tmp_path / "engines")
        opened = tmp_path / "engines" / recipe.stem
    said = run("generate", story, "--engines", opened, "--backend", "reference", "--out", tmp_path / "video.mp4")
    assert "2 steps and a clean pass, guidance 1," in said
    assert read_json(tmp_path / "video.json")["steps"] == 2
    said = run("check", "--recipe", recipe, "--engines", opened, "--backend", "reference", "--story", story,
               "--report", tmp_path / "check.json")  # fmt: skip
    report = read_json(tmp_path / "check.json")
    assert report["passed"] and (report["steps"], report["guidance"]) == (2, 1.0) and len(report["chunks"]) == 1
    assert "sampled with 2 steps, guidance 1" in said
