"""A folder as diffusers' `save_pretrained` leaves it, written here by diffusers and transformers with random weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.formats.model_name import card_of, home
from longtake.preparation import model_and_recipe
from longtake.training.convert.models import convert_dit, convert_text, convert_vae
from longtake.training.models import presets
from longtake.training.models.checkpoint import load_checkpoint
from longtake.training.models.load import load_models
from longtake.training.models.presets import Preset

KINDS = {"dit": convert_dit, "vae": convert_vae, "text_encoder": convert_text}


@pytest.fixture
def known(preset: Preset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Preset:
    """The small preset under its name, and a home of the test's own."""
    monkeypatch.setitem(presets.PRESETS, preset.name, preset)
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "home"))
    return preset


@pytest.fixture
def published(known: Preset, tmp_path: Path) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """The folder, and the weights that its three models had. The transformer lies there in shards."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    folder, dit, vae, text = tmp_path / "Small-Diffusers", known.dit, known.vae, known.text
    models: dict[str, Any] = {
        "dit": WanTransformer3DModel(
            patch_size=dit.patch, num_attention_heads=dit.heads, attention_head_dim=dit.head_dim,
            in_channels=dit.channels, out_channels=dit.channels, text_dim=dit.text_dim, freq_dim=dit.freq_dim,
            ffn_dim=dit.ffn_dim, num_layers=dit.layers, eps=dit.eps,
        ),
        "vae": AutoencoderKLWan(
            base_dim=vae.encoder_dim, decoder_base_dim=vae.decoder_dim, z_dim=vae.z_channels,
            dim_mult=list(vae.dim_mult), num_res_blocks=vae.res_blocks, temperal_downsample=list(vae.temporal_down),
            is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        ),
        "text_encoder": UMT5EncoderModel(UMT5Config(
            vocab_size=text.vocabulary, d_model=text.dim, d_kv=text.dim // text.heads, d_ff=text.ffn_dim,
            num_layers=text.layers, num_heads=text.heads, feed_forward_proj="gated-gelu",
        )),
    }  # fmt: skip
    for kind, model in models.items():
        place = folder / ("transformer" if kind == "dit" else kind)
        model.to(torch.bfloat16).save_pretrained(place, **({"max_shard_size": "300KB"} if kind == "dit" else {}))
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder, {kind: model.state_dict() for kind, model in models.items()}


def check(out: Path, preset: Preset, states: dict[str, dict[str, torch.Tensor]]) -> None:
    """What lies in `out` is, to the bit, what the models' own weights convert to, and it loads."""
    for kind, convert in KINDS.items():
        expected = convert(states[kind], preset, dtype=torch.bfloat16).state_dict()
        tensors, _ = load_checkpoint(out / f"{kind}.safetensors", kind=kind, preset=preset.name)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    load_models(preset, out)


def test_convert_takes_the_folder(published: Any, known: Preset, tmp_path: Path) -> None:
    folder, states = published
    words = ["--preset", known.name, "--dit", str(folder), "--vae", str(folder), "--text", str(folder)]
    assert main(["convert", *words, "--out", str(tmp_path / "out")]) == 0
    check(tmp_path / "out", known, states)


def test_a_name_is_not_needed_the_folder_will_do(
    published: Any, known: Preset, caplog: pytest.LogCaptureFixture
) -> None:
    """`Generator.from_pretrained(FOLDER)`, `--model FOLDER`: converted once, by the preset whose sizes it has."""
    folder, states = published
    model, recipe = model_and_recipe(folder)
    assert (model.name, model.preset, recipe) == ("Small-Diffusers", known.name, None)
    assert model.checkpoints == home() / "Small-Diffusers" / "checkpoints" and "converting" in caplog.text
    check(model.checkpoints, known, states)
    written = (model.checkpoints / "dit.safetensors").stat().st_mtime_ns
    assert model_and_recipe(str(folder))[0] == model  # found again
    assert (model.checkpoints / "dit.safetensors").stat().st_mtime_ns == written
    assert card_of("Small-Diffusers") is None  # a name of its own only once something is made of it


def test_another_folder_of_the_same_name_is_refused(published: Any, known: Preset, tmp_path: Path) -> None:
    folder, states = published
    model, _ = model_and_recipe(folder)
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved, copy_function=shutil.copyfile)  # the same bytes, of another time
    assert model_and_recipe(moved)[0] == model
    shard = min((moved / "transformer").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)  # of the same size
    os.utime(shard, ns=(1, 1))
    with pytest.raises(
        LongtakeError, match=r"(?s)two different models are called Small-Diffusers.*got: .*elsewhere.*rename one"
    ):
        model_and_recipe(moved)
    check(model.checkpoints, known, states)


def test_a_conversion_that_was_cut_short_is_made_again(
    published: Any, known: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, states = published

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("longtake.preparation.convert_dit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model_and_recipe(folder)
    check(model_and_recipe(folder)[0].checkpoints, known, states)
