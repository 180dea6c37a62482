"""What `longtake train --stage dit` offers besides plain teacher forcing, through the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from untrained import random_models

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.plugins.nvfp4.weight_format import WeightFormat, formats_from_meta
from longtake.training.data.latent_cache import LatentCache, cache_from_dataset, frozen_vae
from longtake.training.data.named import dataset_from_name
from longtake.training.data.stored_stories import stored_from_dataset
from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.presets import Preset
from longtake.training.models.side_file import SideFile
from longtake.training.models.text.words import text_encoder_for
from longtake.training.models.wan.window import window_history
from longtake.training.objective.error_recycling import RecyclingConfig
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.trainer import TrainConfig, Trainer

CPU = torch.device("cpu")
OFTEN = RecyclingConfig(capacity=3, clean=0.1, noise=0.5)


@pytest.fixture(autouse=True)
def encode_once(monkeypatch: pytest.MonkeyPatch, cached: dict[str, LatentCache]) -> None:
    def remembered(*args: Any, what: str, **kwargs: Any) -> LatentCache:
        if what not in cached:
            cached[what] = cache_from_dataset(*args, what=what, **kwargs)
        return cached[what]

    monkeypatch.setattr("longtake.training.stages.precompute.cache_from_dataset", remembered)


@pytest.fixture(scope="module")
def cached() -> dict[str, LatentCache]:
    return {}


def options(preset: Preset, vae: Path, **more: Any) -> StageOptions:
    return StageOptions(preset, batch=2, vae=vae, stories=3, chunks=(1, 2), recalibrate=2, seed=5, **more)


def train(
    out: Path, chosen: StageOptions, steps: int = 4, device: torch.device = CPU, **more: Any
) -> dict[str, Tensor]:
    """The tensors of the last resume point."""
    config = TrainConfig(out=out, preset="small", steps=steps, seed=5, evaluate_steps=0, **more)
    Trainer(DiTStage(chosen), config, device).fit()
    return load_file(sorted(out.glob("resume-*.safetensors"))[-1])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


EVERYTHING: dict[str, Any] = {
    "i2v": 0.5,
    "error_recycling": True,
    "errors": OFTEN,
    "gradient_checkpointing": True,
    "precision": "nvfp4",
    "nvfp4_rules": "longlive-dmd",
    "quantize_gradients": True,
}


@pytest.mark.slow
def test_all_of_it_together_resumes_bit_identically(
    tmp_path: Path, small_preset: Preset, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longtake.training.stages.transformer.CALIBRATION_BATCHES", 1)
    chosen = options(small_preset, vae_folder, **EVERYTHING)
    straight = train(tmp_path / "a", chosen, 3)
    train(tmp_path / "b", chosen, 3, stop_at=1)
    assert same(straight, train(tmp_path / "b", chosen, 3, resume=True))
    assert straight["stage/latent/errors"].shape[1:] == (8, 16, 8, 8) and straight["stage/latent/errors"].any()
    assert len(straight["stage/noise/buckets"]) == len(straight["stage/noise/errors"]) > 0
    meta = read_json(tmp_path / "a" / "dit.json")
    assert meta["nvfp4"]["gradient"] == {"rule": "mse", "emulated": True} and meta["nvfp4"]["input"] == {"rule": "mse"}
    assert formats_from_meta(meta).of("any") == WeightFormat("mse", block_2d=True)
    assert meta["i2v"] == 0.5 and meta["error_recycling"]["capacity"] == 3
    assert not [name for name in load_file(tmp_path / "a" / "dit.safetensors") if "quantizer" in name]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, small_preset: Preset, vae_folder: Path) -> None:
    runs = [
        train(tmp_path / str(on), options(small_preset, vae_folder, gradient_checkpointing=on, precision="nvfp4"))
        for on in (False, True)
    ]
    assert same(*runs)


@pytest.mark.parametrize("more", [{"i2v": 1.0}, {"error_recycling": True, "errors": OFTEN}], ids=["i2v", "recycling"])
def test_each_changes_the_training(tmp_path: Path, small_preset: Preset, vae_folder: Path, more: dict) -> None:
    plain = train(tmp_path / "a", options(small_preset, vae_folder), steps=3)
    other = train(tmp_path / "b", options(small_preset, vae_folder, **more), steps=3)
    name = "module/dit/blocks.0.ffn.0.weight"
    assert not torch.equal(plain[name], other[name]) and torch.equal(plain["generator"], other["generator"]) == (
        "i2v" in more
    )


def test_bf16_checkpoints_have_no_4_bit_record(tmp_path: Path, small_preset: Preset, vae_folder: Path) -> None:
    train(tmp_path, options(small_preset, vae_folder), steps=1)
    meta = read_json(tmp_path / "dit.json")
    assert "nvfp4" not in meta and meta["error_recycling"] is None and meta["amax"]


def test_divergence_names_the_batch_and_saves_nothing(
    tmp_path: Path, small_preset: Preset, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def poisoned(self: DiTStage, *args: Any) -> Any:
        for weighted, metrics in honest(self, *args):
            seen.append(str(self.batch_name()))
            yield (weighted * float("inf") if len(seen) == 3 else weighted), metrics

    honest = DiTStage.losses
    monkeypatch.setattr(DiTStage, "losses", poisoned)
    with pytest.raises(LongtakeError, match="step 3 is not finite") as caught:
        train(tmp_path, options(small_preset, vae_folder), steps=8, save_steps=2, log_steps=50)
    assert seen[2] in str(caught.value) and "stories" in seen[2] and "--seed 5" in str(caught.value)
    points = sorted(tmp_path.glob("*.safetensors"))
    assert [point.name for point in points] == ["resume-0000002.safetensors"]
    assert all(x.isfinite().all() for x in load_file(points[0]).values() if x.is_floating_point())


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, small_preset: Preset, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss may look well while an averaged weight or an optimizer's moment is lost."""

    stage = DiTStage(options(small_preset, vae_folder))
    trainer = Trainer(stage, TrainConfig(out=tmp_path, preset="small", steps=4, evaluate_steps=0), CPU)
    monkeypatch.setattr(
        trainer, "log", lambda: trainer.optimizer.ema[0].fill_(float("inf")) if trainer.step == 4 else None
    )
    with pytest.raises(LongtakeError, match="is not written, for its numbers are not finite") as caught:
        trainer.fit()
    assert "ema/" in str(caught.value) and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize-gradients"], "are of training under NVFP4"),
        (["--weight-scales", "2d"], "are of training under NVFP4"),
        (["--nvfp4-rules", "longlive-ar"], "are of training under NVFP4"),
        (["--i2v", "1.5"], "bad --i2v"),
        (["--error-recycling", "--error-capacity", "0"], "bad error recycling"),
        (
            ["--attention", "flex", "--steps", "1", "--stories", "1", "--chunks", "1"],
            "FlexAttention can't train this here",
        ),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str) -> None:
    code = main(["train", "--stage", "dit", "--device", "cpu", "--out", str(tmp_path / "run"), *words])
    said = capsys.readouterr()
    assert code != 0 and message in said.out + said.err and "Traceback" not in said.err


def test_options_reach_the_stage() -> None:
    given = {"precision": "nvfp4", "nvfp4_rules": "longlive-ar", "weight_rule": "mse", "weight_scales": "1d"}
    rules = StageOptions(**given).rules
    assert rules.input == "mse" and rules.weight == WeightFormat("mse") and rules.gradient == "mse"


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_all_of_it_together_on_a_gpu(tmp_path: Path, small_preset: Preset, vae_folder: Path, graph: bool) -> None:
    chosen = options(small_preset, vae_folder, graph=graph, **EVERYTHING)
    stage = DiTStage(chosen)
    config = TrainConfig(out=tmp_path, preset="small", steps=4, seed=5, evaluate_steps=0)
    Trainer(stage, config, torch.device("cuda")).fit()
    assert stage.graphed.enabled == graph
    assert load_file(tmp_path / "resume-0000004.safetensors")["stage/latent/errors"].any()


def test_stories_are_encoded_with_a_vae_and_a_device_alone(small_preset: Preset, vae_folder: Path) -> None:
    """As the experiment does, which prepares no stage for it."""
    stage = DiTStage(options(small_preset, vae_folder))
    stage.device, stage.vae = CPU, frozen_vae(vae_folder / "vae.safetensors", small_preset, CPU)[0]
    assert len(DiTStage.cache(stage, "train", 3, 5)) == 3


def test_one_story_in_the_window_is_not_full_context(small_preset: Preset, vae_folder: Path, tmp_path: Path) -> None:
    vae = frozen_vae(vae_folder / "vae.safetensors", small_preset, CPU)[0]
    text = text_encoder_for(small_preset)
    data = dataset_from_name("digits", small_preset, "train")
    chunks = small_preset.window_chunks + 2
    how: dict[str, Any] = {"stories": 1, "chunks": chunks, "context": "window", "seed": 0}
    in_memory = cache_from_dataset(data, vae, text, small_preset, **how)
    on_disk = stored_from_dataset(data, vae, "d" * 64, text, small_preset, cache_dir=tmp_path, **how)
    for stories in (in_memory, on_disk):
        clips = stories.clips(torch.tensor([0]), chunks)
        assert stories.unmasked(chunks) == clips.unmasked == small_preset.window_chunks
        cuts = stories.cuts[0].tolist()
        assert torch.equal(clips.history, window_history(cuts, small_preset.window_chunks)[None])


def test_init_comes_with_its_own_vae(
    small_preset: Preset, vae_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The VAE beside the checkpoint is the default; another one is taken only where it is asked for, with a word."""
    models = random_models(small_preset)
    for name, module in (("dit", models.dit), ("text_encoder", models.text), ("vae", models.vae)):
        facts = {"vocabulary": list(models.vocabulary)} if name == "text_encoder" else {}
        about = {"kind": name, "preset": small_preset.name, "vae_sha256": "0" * 64, **facts}
        save_checkpoint(tmp_path / f"{name}.safetensors", module.state_dict(), SideFile.of(about))
    stage = DiTStage(replace(options(small_preset, vae_folder, init=tmp_path), vae=None))
    assert stage.companions == [tmp_path / "vae.safetensors"]
    with pytest.raises(LongtakeError, match="trained on latents of another VAE"):
        stage.prepare(CPU)
    DiTStage(options(small_preset, vae_folder, init=tmp_path)).prepare(CPU)
    assert "it is taken, for --vae asks for it" in caplog.text
