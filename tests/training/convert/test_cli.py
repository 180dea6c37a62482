"""The command, from files as they are published to a folder that loads, calibrated."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.training.convert.calibrate import measure
from longtake.training.convert.models import convert_text, convert_vae, shapes_of
from longtake.training.convert.vae_stock import from_stock
from longtake.training.models import presets
from longtake.training.models.checkpoint import load_checkpoint
from longtake.training.models.load import load_models
from longtake.training.models.presets import Preset
from longtake.training.models.quantize import restore_quantizers
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.linears import quantized_linears
from longtake.training.models.wan.vae_codes import codable


@pytest.fixture
def known(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """The small preset, under its name on the command line."""
    monkeypatch.setitem(presets.PRESETS, preset.name, preset)
    return preset


def stock_text(preset: Preset) -> dict[str, Tensor]:
    """Random umT5 weights under Wan's keys."""
    names = {
        "embedding.weight": "token_embedding.weight", "position.weight": "pos_embedding.embedding.weight",
        "gate.weight": "gate.0.weight", "up.weight": "fc1.weight", "down.weight": "fc2.weight",
    }  # fmt: skip
    state = {}
    for key, shape in shapes_of(preset, "text_encoder").items():
        for ours, theirs in names.items():
            key = key.removesuffix(ours) + theirs if key.endswith(ours) else key
        state[key] = torch.randn(shape) * 0.2
    return state


def test_three_files_to_a_folder(
    known: Preset,
    dit_state: dict[str, Tensor],
    stock_vae: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    source, out = tmp_path / "Wan", tmp_path / "out"
    source.mkdir()
    torch.save(dit_state, tmp_path / "model_bf16.pt")
    torch.save(stock_vae, source / "Wan2.2_VAE.pth")
    torch.save(stock_text(known), source / "models_t5_umt5-xxl-enc-bf16.pth")
    files = ["--dit", str(tmp_path / "model_bf16.pt"), "--vae", str(source), "--text", str(source)]
    assert main(["convert", "--preset", "small", *files, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "no activation amax" in said and "--calibrate" in said
    for kind in ("dit", "vae", "text_encoder"):
        tensors, meta = load_checkpoint(out / f"{kind}.safetensors", kind=kind, preset="small")
        assert meta.facts["source"]["keys"] == "wan"
        floats = {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
        assert floats == ({"latent_mean", "latent_std"} if kind == "vae" else set())
    models = load_models(known, out)
    assert not models.amax and torch.allclose(models.vae.latent_mean[:2], torch.tensor([-0.2289, -0.0052]))

    assert main(["convert", "--preset", "small", "--out", str(out), "--calibrate", "--passes", "2"]) == 0
    said = capsys.readouterr().out
    assert "amax of 20 linears" in said
    again = load_models(known, out)
    assert again.convs is not None and again.convs.inputs.keys() == codable(again.vae).keys()
    assert re.search(
        r"vae.json: convolutions of the VAE's decoder, \d+ in fp8, \d+ in int8, \d+ in bf16; frames at [\d.]+ dB", said
    )
    assert set(again.amax) == set(quantized_linears(again.dit))
    assert all(sides["input"] > 0 for sides in again.amax.values())
    restore_quantizers(again.dit, again.amax)


def test_amax_is_what_the_linears_see(preset: Preset) -> None:
    torch.manual_seed(0)
    dit = CausalDiT(preset.dit).eval()
    text = torch.randn(preset.text.length, preset.text.dim)
    seen: dict[str, float] = {}

    def note(name: str):  # noqa: ANN202
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), float(args[0].abs().max()))

        return hook

    hooks = [dit.get_submodule(name).register_forward_pre_hook(note(name)) for name in quantized_linears(dit)]
    weights = {name: float(dit.get_submodule(name).weight.detach().abs().max()) for name in quantized_linears(dit)}  # type: ignore[union-attr]
    amax = measure(dit, preset, text, chunks=2, passes=2, latents=None, seed=3)
    for hook in hooks:
        hook.remove()
    assert {name: sides["weight"] for name, sides in amax.items()} == pytest.approx(weights)
    assert {name: sides["input"] for name, sides in amax.items()} == pytest.approx(seen)


def test_latents_are_used_and_checked(
    known: Preset, dit_state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(dit_state, tmp_path / "m.pt")
    torch.save({"latents": torch.randn(16, 48, 2, 4) * 30}, tmp_path / "latents.pt")
    torch.save({"latents": torch.randn(16, 16, 2, 4)}, tmp_path / "wrong.pt")
    command = [
        "convert",
        "--preset",
        "small",
        "--dit",
        str(tmp_path / "m.pt"),
        "--out",
        str(tmp_path / "out"),
        "--calibrate",
    ]
    amax = {}
    for name, extra in {"noise": [], "latents": ["--latents", str(tmp_path / "latents.pt")]}.items():
        assert main([*command, *extra]) == 0
        amax[name] = json.loads((tmp_path / "out/dit.json").read_text())["amax"]
    assert amax["noise"] != amax["latents"]
    assert main([*command, "--latents", str(tmp_path / "wrong.pt")]) == 2
    assert "latents [B, F >= 16, 48, 2, 4]" in capsys.readouterr().err


def test_nothing_is_written_unless_all_fits(
    known: Preset,
    dit_state: dict[str, Tensor],
    stock_vae: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    torch.save(dit_state, tmp_path / "m.pt")
    del stock_vae["conv2.bias"]
    torch.save(stock_vae, tmp_path / "vae.pth")
    files = ["--dit", str(tmp_path / "m.pt"), "--vae", str(tmp_path / "vae.pth")]
    assert main(["convert", "--preset", "small", *files, "--out", str(tmp_path / "out")]) == 4
    assert "1 missing: post_quant.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_disk_is_checked_first(
    known: Preset,
    dit_state: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    torch.save(dit_state, tmp_path / "m.pt")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    assert main(["convert", "--preset", "small", "--dit", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")]) == 2
    assert "not enough disk space" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_stock_vae_has_our_shapes(preset: Preset, stock_vae: dict[str, Tensor]) -> None:
    state = convert_vae(stock_vae, preset).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes_of(preset, "vae")


def test_stock_vae_is_diffusers_vae_under_other_names(preset: Preset, stock_vae: dict[str, Tensor]) -> None:
    """Renamed it loads strictly into AutoencoderKLWan, and comes out the same by either way."""
    from diffusers import AutoencoderKLWan

    config = preset.vae
    theirs = AutoencoderKLWan(
        base_dim=config.encoder_dim, decoder_base_dim=config.decoder_dim, z_dim=config.z_channels,
        dim_mult=list(config.dim_mult), num_res_blocks=config.res_blocks, temperal_downsample=list(config.temporal_down),
        is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
    )  # fmt: skip
    theirs.load_state_dict(from_stock(stock_vae))
    one, other = convert_vae(stock_vae, preset).state_dict(), convert_vae(theirs.state_dict(), preset).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(LongtakeError, match=r"this is the Wan 2.1 VAE"):
        convert_vae({**stock_vae, "encoder.conv1.weight": torch.ones(96, 3, 3, 3, 3)}, preset)


def test_text_of_hugging_face_equals_wans(preset: Preset) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    text = preset.text
    config = UMT5Config(
        vocab_size=text.vocabulary, d_model=text.dim, d_kv=text.dim // text.heads, d_ff=text.ffn_dim, num_layers=text.layers,
        num_heads=text.heads, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    theirs = UMT5EncoderModel(config).state_dict()
    model = convert_text(theirs, preset)
    assert model.meta["source"]["keys"] == "huggingface"
    assert torch.equal(model.state_dict()["embedding.weight"], theirs["shared.weight"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--lora", "x.pt"],
        ["--lora-scale", "0.5"],
        ["--vae", "x.pth", "--latents", "x.safetensors"],
        ["--calibrate", "--chunks", "0"],
    ],
)
def test_arguments_that_mean_nothing(arguments: list[str], tmp_path: Path) -> None:
    assert main(["convert", *arguments, "--out", str(tmp_path)]) == 2
