"""LoRA merged into the weights: numerics, keys, and what doesn't fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.commands.convert import stored_scale
from longtake.errors import IntegrityError, LongtakeError
from longtake.training.convert.models import convert_dit
from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.linears import quantized_linears

State = dict[str, Tensor]
RANK = 4


@pytest.fixture
def lora(preset: Preset, dit_state: State) -> State:
    generator = torch.Generator().manual_seed(1)
    state = {}
    with torch.device("meta"):
        names = quantized_linears(CausalDiT(preset.dit))
    for name in names:
        out, into = dit_state[f"{name}.weight"].shape
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    return state


def merged(dit_state: State, lora: State, scale: float) -> State:
    """W + scale B A in float64, rounded once."""
    result = dict(dit_state)
    for key, a in lora.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = lora[key.replace("lora_A", "lora_B")]
            result[f"{name}.weight"] = (
                dit_state[f"{name}.weight"].double() + scale * (b.double() @ a.double())
            ).bfloat16()
    return result


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merge_is_in_fp32_and_rounded_once(scale: float, preset: Preset, dit_state: State, lora: State) -> None:
    got = convert_dit(dit_state, preset, lora=lora, lora_scale=scale).state_dict()
    wanted = merged(dit_state, lora, scale)
    changed = 0
    for name, tensor in wanted.items():
        assert got[name].dtype == torch.bfloat16
        # A tie in float64 may fall to the other side in fp32: one rounding step, and almost never.
        assert (got[name] != tensor).float().mean() < 1e-3
        assert torch.allclose(got[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)
        changed += not torch.equal(tensor, dit_state[name])
    assert changed == 10 * preset.dit.layers


def test_generator_lora_needs_a_base(preset: Preset, dit_state: State, lora: State) -> None:
    with pytest.raises(LongtakeError, match=r"LoRA only[\s\S]*--base"):
        convert_dit({"generator_lora": lora, "step": 3}, preset)
    alone = convert_dit({"generator_lora": lora}, preset, base={"generator": dit_state})
    beside = convert_dit(dit_state, preset, lora={"generator_lora": lora})
    assert alone.meta["source"]["entry"] == "generator + generator_lora" and alone.meta["lora"] == {
        "merged": 1,
        "scale": 1.0,
    }
    assert all(torch.equal(x, beside.state_dict()[name]) for name, x in alone.state_dict().items())


def test_adapter_names_in_keys(preset: Preset, dit_state: State, lora: State) -> None:
    named = {key.replace(".weight", ".default.weight"): value for key, value in lora.items()}
    one, other = (convert_dit(dit_state, preset, lora=x).state_dict() for x in (lora, named))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lora_that_does_not_fit(preset: Preset, dit_state: State, lora: State) -> None:
    first = next(iter(lora))
    with pytest.raises(IntegrityError, match=r"1 LoRA pairs are not whole[\s\S]*blocks.0.self_attn.q \(only lora_B\)"):
        convert_dit(dit_state, preset, lora={key: value for key, value in lora.items() if key != first})
    with pytest.raises(IntegrityError, match=r"doesn't fit blocks.0.self_attn.q"):
        convert_dit(dit_state, preset, lora={**lora, first: torch.ones(RANK, 7)})
    strange = {key.replace("blocks.1.", "blocks.9."): value for key, value in lora.items()}
    with pytest.raises(IntegrityError, match=r"10 linears that the model lacks[\s\S]*blocks.9.cross_attn.k"):
        convert_dit(dit_state, preset, lora=strange)
    with pytest.raises(LongtakeError, match="holds no LoRA"):
        convert_dit(dit_state, preset, lora=dit_state)


def test_scale_of_the_adapter_config(tmp_path: Path) -> None:
    assert stored_scale(tmp_path / "lora.pt") == 1.0
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 64, "r": 128}))
    assert stored_scale(tmp_path / "lora.pt") == 0.5
