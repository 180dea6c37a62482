"""Embeddings on disk: made once for every encoder, shared, made anew where they are damaged, and the encoder's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.data import embedding_cache
from longtake.training.data.embedding_cache import CachedText, digest_of_state, embeddings_from_cache, row_hash, row_key
from longtake.training.data.shards import Shards
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import TextEncoder
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.options import StageOptions
from longtake.training.trainer import TrainConfig, Trainer

CPU = torch.device("cpu")
PROMPTS = ["a green seven", "a red two rises", "a green seven", "", "the scene transitions . a red two"]


class Counting(TextEncoder):
    """How many prompts were encoded?"""

    read = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.read += len(tokens)
        return super().forward(tokens)


def encoder(preset: Preset, seed: int = 0) -> Counting:
    torch.manual_seed(seed)
    return Counting(preset.text).requires_grad_(False)


def cached(preset: Preset, text: Counting, folder: Path, prompts: list[str] = PROMPTS) -> CachedText:
    return embeddings_from_cache(
        text, digest_of_state(text), text.tokenize(prompts), preset, cache_dir=folder, device=CPU,
        autocast=lambda: torch.autocast("cpu", enabled=False), bf16=False,
    )  # fmt: skip


@pytest.mark.parametrize("resident", [1 << 30, 0], ids=["on the device", "on disk"])
def test_the_second_run_encodes_nothing(
    tmp_path: Path, small_preset: Preset, monkeypatch: pytest.MonkeyPatch, resident: int
) -> None:
    monkeypatch.setattr(embedding_cache, "RESIDENT_BYTES", resident)
    text = encoder(small_preset)
    tokens = text.tokenize([*PROMPTS, PROMPTS[1]])
    wanted = text(tokens)
    text.read = 0
    found = cached(small_preset, text, tmp_path)
    assert text.read == 3 and found.resident == bool(resident)  # prompts that differ; the empty one is zeros
    torch.testing.assert_close(found(tokens), wanted)
    again = encoder(small_preset)
    torch.testing.assert_close(cached(small_preset, again, tmp_path)(tokens), wanted)
    assert again.read == 0
    cached(small_preset, again, tmp_path, [*PROMPTS, "a blue nine"])
    assert again.read == 1
    other = encoder(small_preset, seed=1)
    changed = cached(small_preset, other, tmp_path)
    assert other.read == 3 and not torch.allclose(changed(tokens), wanted, atol=1e-3)
    assert len(list((tmp_path / "text").iterdir())) == 2


def test_a_damaged_file_is_made_anew_and_named(
    tmp_path: Path, small_preset: Preset, caplog: pytest.LogCaptureFixture
) -> None:
    text = encoder(small_preset)
    tokens = text.tokenize(PROMPTS)
    wanted = cached(small_preset, text, tmp_path)(tokens)
    for damage in (lambda data: data[:100], lambda data: data[:-1] + bytes([data[-1] ^ 1])):  # cut off; a bit flipped
        (path,) = tmp_path.glob("text/*/*.safetensors")
        path.write_bytes(damage(path.read_bytes()))
        text.read = 0
        with caplog.at_level(logging.WARNING):
            torch.testing.assert_close(cached(small_preset, text, tmp_path)(tokens), wanted)
        assert text.read == 3 and path.name in caplog.text
        caplog.clear()
    text.read = 0
    cached(small_preset, text, tmp_path)
    assert text.read == 0 and not caplog.text


def test_what_is_damaged_after_the_start_is_an_error(
    tmp_path: Path, small_preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_cache, "RESIDENT_BYTES", 0)
    text = encoder(small_preset)
    found = cached(small_preset, text, tmp_path)
    (path,) = tmp_path.glob("text/*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(IntegrityError, match=r"(?s)is damaged.*delete it and start again"):
        for prompt in PROMPTS:
            found(text.tokenize([prompt]))


def test_a_prompt_outside_the_cache_is_never_another_ones(tmp_path: Path, small_preset: Preset) -> None:
    text = encoder(small_preset)
    found = cached(small_preset, text, tmp_path)
    unknown = text.tokenize(["a blue nine"])
    assert found(unknown).isnan().all()
    assert len(set(row_hash(text.tokenize(PROMPTS)).tolist())) == 4
    padded = torch.cat((unknown, torch.zeros_like(unknown)), 1)
    assert row_key(unknown[0]) == row_key(padded[0])


def stage(preset: Preset, vae: Path, cache: Path | None, **more: Any) -> DiTStage:
    made = DiTStage(StageOptions(preset, batch=2, vae=vae, stories=3, chunks=(1,), seed=5, cache_dir=cache, **more))
    made.text.__class__ = Counting
    return made


def train(made: DiTStage, out: Path, **more: Any) -> dict[str, Tensor]:
    Trainer(made, TrainConfig(out=out, preset="small", steps=2, seed=5, evaluate_steps=0, **more), CPU).fit()
    return load_file(out / "dit.safetensors")


def test_training_with_a_frozen_encoder_reads_the_cache(
    tmp_path: Path, small_preset: Preset, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with one that learns: its embeddings change."""
    cache = tmp_path / "cache"
    first, again, learning = (
        stage(small_preset, vae_folder, cache, freeze_text=freeze) for freeze in (True, True, False)
    )
    results = [train(made, tmp_path / str(i)) for i, made in enumerate((first, again))]
    encoded = first.text.read
    assert 0 < encoded and again.text.read == 0
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    with monkeypatch.context() as patch:  # the same without the cache of embeddings
        patch.setattr(DiTStage, "cache_text", lambda self: None)
        plain = train(stage(small_preset, vae_folder, cache, freeze_text=True), tmp_path / "plain")
    assert all(torch.allclose(results[0][name], plain[name], atol=1e-5) for name in plain)
    train(learning, tmp_path / "learning")
    assert learning.text.read > encoded and len(list((cache / "text").iterdir())) == 1


def test_another_encoder_cannot_go_on_with_a_run(tmp_path: Path, small_preset: Preset, vae_folder: Path) -> None:
    made = stage(small_preset, vae_folder, tmp_path / "cache", freeze_text=True)
    train(made, tmp_path / "run", stop_at=1)
    other = stage(small_preset, vae_folder, tmp_path / "cache", freeze_text=True)
    other.text_digest = "0" * 64
    with pytest.raises(LongtakeError, match="had another text encoder"):
        train(other, tmp_path / "run", resume=True)


def test_checksums_are_of_every_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5), "c": torch.zeros(2, 0)}
    with Shards(tmp_path) as shards:
        for key, value in tensors.items():
            shards.add(key, value)
    read = Shards(tmp_path)
    assert all(torch.equal(read[key], value) for key, value in tensors.items())
