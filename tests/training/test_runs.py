"""A run's folder: an earlier run is moved aside whole, --resume --out goes on alone, and samples are what a session makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from folder_writer import write_digits_folder
from safetensors.torch import load_file
from untrained import random_models

from longtake.commands.main import main
from longtake.files import read_json
from longtake.training.data.latent_cache import cache_from_dataset
from longtake.training.data.named import dataset_from_name
from longtake.training.experiment.batched import Rollout, Sampling, Script
from longtake.training.models.presets import PRESETS, Preset
from longtake.training.stages.validation import sampled_video

CPU = torch.device("cpu")


@pytest.fixture
def clips(tmp_path: Path, small_preset: Preset, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digits of 32x32 pixels; the small preset takes that size."""
    preset = replace(small_preset, height=32, width=32)
    monkeypatch.setitem(PRESETS, preset.name, preset)
    write_digits_folder(tmp_path / "clips", preset, 2, seed=1, chunks=1)
    return tmp_path / "clips"


def test_resume_and_out_alone_go_on_as_told(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--stage", "vae", "--preset", "small", "--device", "cpu", "--data", str(clips)]
    told += ["--batch", "1", "--steps", "3", "--fit", "pad", "--lr", "2e-3"]
    (tmp_path / "mine.yaml").write_text("seed: 7\nevaluate-steps: 0\n")
    words = [*told, "--config", str(tmp_path / "mine.yaml")]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["train", *words, "--out", str(straight)]) == 0
    assert "2 clips, 2 s" in capsys.readouterr().out
    assert main(["train", *words, "--out", str(stopped), "--stop-at", "1"]) == 0
    kept = yaml.safe_load((stopped / "run.yaml").read_text())
    assert kept["seed"] == 7 and kept["lr"] == "2e-3" and not {"out", "resume", "config"} & kept.keys()
    (tmp_path / "mine.yaml").unlink()
    assert main(["train", "--resume", "--out", str(stopped), "--stop-at", "3"]) == 0
    one, other = (load_file(folder / "vae.safetensors") for folder in (straight, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_json(stopped / "vae.json")["fit"] == "pad"
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path / "nowhere")]) == 2
    assert "nothing to resume in" in capsys.readouterr().err


def test_a_new_run_gets_a_new_folder_and_loses_nothing(
    tmp_path: Path, clips: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "vae"
    words = ["train", "--stage", "vae", "--preset", "small", "--device", "cpu", "--data", str(clips), "--batch", "1"]
    assert main([*words, "--steps", "2", "--out", str(out)]) == 0
    first = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    events = {path.name for path in (out / "tensorboard").iterdir()}
    assert main([*words, "--steps", "1", "--out", str(out)]) == 0
    assert "holds an earlier run, which is now in" in caplog.text
    earlier = out / "earlier" / "1"
    assert {path.name: path.read_bytes() for path in earlier.iterdir() if path.is_file()} == first
    assert {"vae.safetensors", "vae.json", "loss.json", "report.json", "run.yaml"} <= first.keys()
    assert {path.name for path in (earlier / "tensorboard").iterdir()} == events
    assert not events & {path.name for path in (out / "tensorboard").iterdir()}
    assert read_json(out / "vae.json")["steps"] == 1


def test_what_is_shown_is_what_a_session_makes(small_preset: Preset) -> None:
    models = random_models(replace(small_preset, sampling=replace(small_preset.sampling, steps=3)))
    preset = models.preset
    data = dataset_from_name("digits", preset, "eval")
    held_out = cache_from_dataset(
        data, models.vae, models.text, preset, stories=1, chunks=2, context="window", seed=5
    )  # fmt: skip
    shown = sampled_video(models.dit, models.text, models.vae, held_out, 2)
    (batch,) = [data.sample(torch.Generator().manual_seed(5), 2, 1, CPU)]
    script = Script(tuple(batch.prompts[0]), tuple(batch.cuts[0]))
    chunks = Rollout(models, [script], Sampling(steps=3, guidance=preset.sampling.guidance, cache="bf16"), CPU)
    with torch.no_grad():
        expected = models.vae.decode(torch.cat(list(chunks), 1))
    frames = ((expected * 0.5 + 0.5) * 255).round().to(torch.uint8).transpose(1, 2)
    assert shown.shape == (2, 61, 3, 128, 128)
    assert (shown[1].int() - frames[0].int()).abs().max() <= 1
