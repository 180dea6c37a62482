"""Every container of a DiT comes out as the same weights, and as a pair that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.errors import IntegrityError
from longtake.training.convert.files import read_container
from longtake.training.convert.models import convert_dit, shapes_of
from longtake.training.models.checkpoint import load_checkpoint, load_into
from longtake.training.models.presets import WAN22_TI2V_5B, Preset
from longtake.training.models.wan.dit import CausalDiT

State = dict[str, Tensor]


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def diffusers_keys(state: State, preset: Preset) -> State:
    """`state` under diffusers' own names, by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return dict(convert_wan_transformer_to_diffusers(dict(state)))


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def fsdp(state: State) -> State:
    return {
        "model._fsdp_wrapped_module." + key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): v
        for key, v in state.items()
    }


CONTAINERS: dict[str, Callable[[State], dict[str, Any]]] = {
    "raw": lambda state: state,
    "raw with prefix": lambda state: prefixed(state, "model."),
    "comfy": lambda state: prefixed(state, "model.diffusion_model."),
    "generator": lambda state: {"generator": prefixed(state, "model."), "step": 600},
    "model": lambda state: {"model": state},
    "ema only": lambda state: {"generator_ema": fsdp(state)},
    "training": lambda state: {
        "generator": fsdp(state),
        "critic": {"x": torch.ones(1)},
        "generator_optimizer": {"state": {}},
    },
    "merged": lambda state: {
        "generator": prefixed(state, "model."),
        "checkpoint_format": "longlive_generator_merged_lora",
    },
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_torch_containers(name: str, preset: Preset, dit_state: State, tmp_path: Path) -> None:
    torch.save(CONTAINERS[name](dit_state), tmp_path / "model.pt")
    assert same(convert_dit(read_container(tmp_path / "model.pt"), preset).state_dict(), dit_state)


def test_ema_is_taken_only_if_asked_for(preset: Preset, dit_state: State) -> None:
    ema = {key: value * 2 for key, value in dit_state.items()}
    container = {"generator": prefixed(dit_state, "model."), "generator_ema": fsdp(ema)}
    assert same(convert_dit(container, preset).state_dict(), dit_state)
    assert same(convert_dit(container, preset, use_ema=True).state_dict(), ema)


def test_diffusers_keys(preset: Preset, dit_state: State) -> None:
    theirs = diffusers_keys(dit_state, preset)
    assert theirs.keys().isdisjoint({"head.modulation"}) and "condition_embedder.time_proj.weight" in theirs
    assert same(convert_dit(theirs, preset).state_dict(), dit_state)


@pytest.mark.parametrize("place", ["", "transformer"])
def test_sharded_folder(place: str, preset: Preset, dit_state: State, tmp_path: Path) -> None:
    folder = write_shards(diffusers_keys(dit_state, preset), tmp_path / place)
    assert same(convert_dit(read_container(tmp_path), preset).state_dict(), dit_state)
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"lacks 1 of 3 shards[\s\S]*no part-2.safetensors"):
        read_container(tmp_path)


def write_shards(state: State, folder: Path, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    weight_map = {key: f"part-{i % count}.safetensors" for i, key in enumerate(state)}
    for shard in set(weight_map.values()):
        save_file({key: state[key] for key in state if weight_map[key] == shard}, folder / shard)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_written_pair_loads_as_it_is(preset: Preset, dit_state: State, tmp_path: Path) -> None:
    model = convert_dit(dit_state, preset)
    model.write(tmp_path / "dit.safetensors")
    tensors, meta = load_checkpoint(tmp_path / "dit.safetensors", kind="dit", preset="small")
    assert same(tensors, dit_state) and tensors["head.head.weight"].dtype == torch.bfloat16
    assert meta.facts["source"] == {"entry": "raw", "keys": "wan"} and not meta.amax
    load_into(CausalDiT(preset.dit), tmp_path / "dit.safetensors", kind="dit", preset="small")
    assert (tmp_path / "dit.safetensors").stat().st_size - model.nbytes < 8192


def test_a_failure_leaves_what_was_there(preset: Preset, dit_state: State, tmp_path: Path) -> None:
    convert_dit(dit_state, preset).write(tmp_path / "dit.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = {**dit_state, "blocks.1.ffn.2.bias": torch.full((128,), torch.nan)}
    with pytest.raises(IntegrityError, match="blocks.1.ffn.2.bias is not finite"):
        convert_dit(bad, preset).write(tmp_path / "dit.safetensors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_5b_has_every_key_and_shape_of_the_release() -> None:
    linear = {"weight": lambda o, i: (o, i), "bias": lambda o, i: (o,)}
    expected: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (3072, 48, 1, 2, 2), "patch_embedding.bias": (3072,),
        "head.modulation": (1, 2, 3072),
    }  # fmt: skip

    def add(name: str, out: int, into: int) -> None:
        expected.update({f"{name}.{part}": shape(out, into) for part, shape in linear.items()})

    for name, out, into in (
        ("text_embedding.0", 3072, 4096), ("text_embedding.2", 3072, 3072), ("time_embedding.0", 3072, 256),
        ("time_embedding.2", 3072, 3072), ("time_projection.1", 18432, 3072), ("head.head", 192, 3072),
    ):  # fmt: skip
        add(name, out, into)
    for n in range(30):
        expected[f"blocks.{n}.modulation"] = (1, 6, 3072)
        expected |= {f"blocks.{n}.norm3.{part}": (3072,) for part in ("weight", "bias")}
        for attention in ("self_attn", "cross_attn"):
            expected |= {f"blocks.{n}.{attention}.norm_{x}.weight": (3072,) for x in "qk"}
            for x in "qkvo":
                add(f"blocks.{n}.{attention}.{x}", 3072, 3072)
        add(f"blocks.{n}.ffn.0", 14336, 3072)
        add(f"blocks.{n}.ffn.2", 3072, 14336)
    assert shapes_of(WAN22_TI2V_5B, "dit") == expected
    state = {f"model.{key}": torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in expected.items()}
    model = convert_dit({"generator": state}, WAN22_TI2V_5B)
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == expected
    assert 9.9e9 < model.nbytes < 10.1e9


def test_presets_may_be_objects(preset: Preset, dit_state: State) -> None:
    other = replace(preset, name="another name")
    assert convert_dit(dit_state, other).preset.name == "another name"
