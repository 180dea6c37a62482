"""Published containers: the publisher's names and diffusers', prefixes, training checkpoints, shards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_world import filled
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.convert.files import read_container
from longtake.training.convert.models import convert_dit, convert_vae
from longtake.training.models.families import preset_from_file
from longtake.training.models.presets import Preset
from longtake.training.models.sana_wm.dit import SanaWMDiT
from longtake.training.models.sana_wm.vae import LTX2VAE

YAML = """
base: world-tiny
dit: {dim: 32, ffn_dim: 48, layers: 4, heads: 2, channels: 8, text_dim: 16, text_len: 8}
vae: {z_channels: 8, encoder_widths: [8, 8, 16], decoder_widths: [8, 16, 32]}
text: {dim: 16, layers: 1, heads: 2, length: 8}
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    path = tmp_path_factory.mktemp("preset") / "small.yaml"
    path.write_text(YAML)
    return preset_from_file(path)


@pytest.fixture(scope="module")
def ours(preset: Preset) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return filled(SanaWMDiT(preset.dit)).state_dict()  # type: ignore[arg-type]


def published(state: dict[str, Tensor], layers: int = 4) -> dict[str, Tensor]:
    """As its publisher names and shapes them, with what has no use."""
    out = {}
    for key, tensor in state.items():
        if key in ("x_embedder.proj.weight", "plucker_embedder.proj.weight"):
            tensor = tensor[..., None, None, None]
        elif key.endswith(("inverted_conv.conv.weight", "point_conv.conv.weight")):
            tensor = tensor[..., None, None]
        elif "conv_k" in key:
            tensor = tensor[:, None]
        out[key] = tensor.contiguous()
    extra: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 4, 32),
        "y_embedder.y_embedding": (8, 16),
        "raymap_embedder.proj.weight": (32, 3, 1, 1, 1),
        "raymap_embedder.proj.bias": (32,),
    }
    extra |= {f"blocks.{i}.attn.recall_gate": (1,) for i in range(layers)}
    extra |= {
        f"blocks.3.attn.{name}": shape
        for name, shape in (
            ("beta_proj.weight", (2, 32)),
            ("beta_proj.bias", (2,)),
            ("gate_proj.weight", (2, 32)),
            ("gate_proj.bias", (2,)),
            ("A_log", (2,)),
            ("dt_bias", (2,)),
        )
    }
    return out | {key: torch.zeros(shape) for key, shape in extra.items()}


def same(converted: Any, ours: dict[str, Tensor]) -> None:
    got = converted.state_dict()
    assert got.keys() == ours.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in ours.items())


def test_every_container(preset: Preset, ours: dict[str, Tensor], tmp_path: Path) -> None:
    state = published(ours)
    same(convert_dit(state, preset), ours)
    save_file(state, tmp_path / "model.safetensors")
    same(convert_dit(read_container(tmp_path / "model.safetensors"), preset), ours)
    (tmp_path / "sana_dit").mkdir()
    training = {
        "generator": {f"model.{key}": tensor for key, tensor in state.items()},
        "critic": {"w": torch.zeros(1)},
        "step": 7,
    }
    torch.save(training, tmp_path / "sana_dit" / "model.pt")
    converted = convert_dit(read_container(tmp_path), preset)
    same(converted, ours)
    assert converted.meta["source"] == {"entry": "generator", "keys": "sana"}
    assert converted.meta["dialect"] == {"softmax_scale": [0, 0], "camera_conv_tail": True, "ray_clip": "none"}
    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(state)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    same(convert_dit(read_container(shards), preset), ours)


def test_diffusers_names(preset: Preset, ours: dict[str, Tensor]) -> None:
    state = {
        key.replace("t_embedder.mlp.0.", "t_embedder.linear_1.").replace("t_embedder.mlp.2.", "t_embedder.linear_2."): t
        for key, t in published(ours).items()
        if key not in ("pos_embed", "y_embedder.y_embedding")
    }
    converted = convert_dit(state, preset)
    same(converted, ours)
    assert converted.meta["source"]["keys"] == "diffusers"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.pop("t_block.1.bias"), "1 missing: t_block.1.bias"),
        (lambda s: s.update({"blocks.0.attn.more": torch.zeros(1)}), "1 extra: blocks.0.attn.more"),
        (lambda s: s.update({"blocks.1.attn.qkv.weight": torch.zeros(96, 16)}), r"1 of another shape: blocks.1.attn.qkv.weight \[96, 16\] instead of \[96, 32\]"),
        (lambda s: s.update({"blocks.0.attn.conv_k.weight": torch.zeros(32, 1, 5)}), r"conv_k.weight \[32, 5\] instead of \[32, 4\]"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(32, 8, 1, 2, 2)}), r"x_embedder.proj.weight \[32, 8, 1, 2, 2\]"),
    ],
)  # fmt: skip
def test_what_does_not_match_is_refused(preset: Preset, ours: dict[str, Tensor], change: Any, says: str) -> None:
    state = published(ours)
    change(state)
    with pytest.raises(IntegrityError, match=f"(?s)the DiT of preset small.*{says}"):
        convert_dit(state, preset)


def test_the_refiner_is_recognised(preset: Preset) -> None:
    state = {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(4, 4), "proj_in.weight": torch.zeros(4, 4)}
    with pytest.raises(LongtakeError, match=r"(?s)SANA-WM's refiner.*stage 1 only.*sana_dit/model.pt"):
        convert_dit({"generator": state}, preset)


def test_the_vae(preset: Preset) -> None:
    vae = filled(LTX2VAE(preset.vae))  # type: ignore[arg-type]
    vae.latent_std.fill_(1.00123)
    state = {
        {"latent_mean": "latents_mean", "latent_std": "latents_std"}.get(k, k): t for k, t in vae.state_dict().items()
    }
    converted = convert_vae(state, preset, dtype=torch.bfloat16).state_dict()
    assert converted["latent_std"].dtype == torch.float32 and float(converted["latent_std"][0]) == pytest.approx(
        1.00123
    )
    assert torch.equal(converted["decoder.conv_in.conv.weight"], vae.decoder.conv_in.conv.weight.bfloat16())
    state.pop("decoder.conv_out.conv.bias")
    with pytest.raises(IntegrityError, match=r"(?s)the VAE of preset small.*1 missing: decoder.conv_out.conv.bias"):
        convert_vae(state, preset)
