"""Packed 4-bit checkpoints: weights are what LongLive dequantizes, and packing them again gives the same bits."""

from __future__ import annotations

import pytest
import torch
from swizzle import swizzle_scales
from torch import Tensor

from longtake.errors import IntegrityError
from longtake.plugins.nvfp4.reference import dequantize, quantize
from longtake.training.convert.models import convert_dit
from longtake.training.convert.packed import packed_linear, unpack
from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.linears import quantized_linears

State = dict[str, Tensor]


def linears(preset: Preset) -> list[str]:
    with torch.device("meta"):
        return quantized_linears(CausalDiT(preset.dit))


def pack(state: State, names: list[str], rule: str = "mse") -> State:
    """`state` as save_merged_nvfp4_generator stores it."""
    result = dict(state)
    for name in names:
        weight = result.pop(f"{name}.weight")
        packed = quantize(weight, rule=rule, order="longlive")
        rows, columns = weight.shape
        result[f"{name}.quantized_weight_values"] = packed.values
        result[f"{name}.quantized_weight_scale_factors"] = swizzle_scales(packed.scales)
        result[f"{name}.quantized_weight_amax"] = packed.amax.reshape(1)
        result[f"{name}.quantized_weight_metadata"] = torch.tensor([rows, columns, rows, columns], dtype=torch.int32)
    return {f"model.{key}": value for key, value in result.items()}


@pytest.fixture
def packed(preset: Preset, dit_state: State) -> State:
    return pack(dit_state, linears(preset))


@pytest.mark.parametrize("rule", ["mse", "static_6"])
def test_weights_are_the_dequantized_ones(rule: str, preset: Preset, dit_state: State) -> None:
    container = {"generator": pack(dit_state, linears(preset), rule), "checkpoint_format": "longlive_generator_nvfp4"}
    model = convert_dit(container, preset, packed_rule=rule)
    state = model.state_dict()
    for name in linears(preset):
        source = quantize(dit_state[f"{name}.weight"], rule=rule, order="longlive")
        assert torch.equal(state[f"{name}.weight"], dequantize(source, order="longlive"))
    assert torch.equal(state["head.head.weight"], dit_state["head.head.weight"])
    assert model.meta["packed"]["rule"] == rule and model.meta["packed"]["order"] == "longlive"


def test_packing_the_bf16_weights_again_loses_nothing(preset: Preset, packed: State) -> None:
    """With the rule and amax of the side file: bf16's rounding moves no code and no scale, so values are the same."""
    model = convert_dit(packed, preset, dtype=torch.bfloat16)
    state = {key.removeprefix("model."): value for key, value in packed.items()}
    weights = model.state_dict()
    for name, amax in model.meta["packed"]["amax"].items():
        source = packed_linear(name, state, "mse")
        again = quantize(weights[f"{name}.weight"], rule="mse", order="longlive", amax=amax)
        assert torch.equal(dequantize(again, order="longlive"), dequantize(source, order="longlive"))


def test_0d_amax_and_no_metadata(preset: Preset, packed: State) -> None:
    other = {key: value.reshape(()) if key.endswith("_amax") else value for key, value in packed.items()}
    other = {key: value for key, value in other.items() if not key.endswith("_metadata")}
    one, two = convert_dit(packed, preset).state_dict(), convert_dit(other, preset).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_packed_parts_that_do_not_fit(preset: Preset, packed: State) -> None:
    key = "model.blocks.0.ffn.0.quantized_weight_scale_factors"
    with pytest.raises(IntegrityError, match="packed linear blocks.0.ffn.0 is not whole"):
        convert_dit({name: value for name, value in packed.items() if name != key}, preset)
    with pytest.raises(IntegrityError, match="packed linear blocks.0.ffn.0 doesn't fit itself"):
        convert_dit({**packed, key: packed[key][:-16]}, preset)
    with pytest.raises(IntegrityError, match="rounded by a cast"):
        convert_dit({**packed, key: packed[key].bfloat16()}, preset)


def test_padding_is_cut_off() -> None:
    weight = torch.randn(200, 144)
    packed = quantize(torch.nn.functional.pad(weight, (0, 48, 0, 56)), rule="mse", order="longlive")
    state = {
        "x.quantized_weight_values": packed.values,
        "x.quantized_weight_scale_factors": swizzle_scales(packed.scales),
        "x.quantized_weight_amax": packed.amax,
        "x.quantized_weight_metadata": torch.tensor([200, 144, 256, 192], dtype=torch.int32),
    }
    got = unpack(state, "mse")[0]["x.weight"].make()
    assert torch.equal(got, dequantize(quantize(weight, rule="mse", order="longlive"), order="longlive"))
