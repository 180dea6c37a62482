"""Exports pack weights by the rule that the checkpoint was trained or packed with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from held_weights import weights_from_models
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.export.lower import lower, packed_weight
from longtake.export.package import PlainGraphs
from longtake.export.weights import stored_tensors, weights_from_folder
from longtake.formats.recipe import recipe_named
from longtake.plugins.nvfp4.reference import RULE_LIMITS, Packed, dequantize, fake_quantize, quantize
from longtake.plugins.nvfp4.weight_format import WeightFormat, WeightFormats, formats_from_meta
from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.load import Models, load_models
from longtake.training.models.quantize import apply_precision
from longtake.training.models.side_file import SideFile
from longtake.training.models.wan.linears import quantized_linears

RECIPES = {"w4a16": "tiny_w4a16_sm89", "nvfp4": "tiny_nvfp4_sm120"}
NAME = "blocks.1.ffn.0"


def decoded(content: dict[str, Tensor], name: str) -> Tensor:
    """What an engine multiplies with: q (S g), g as stored."""
    values, scales = content[f"{name}.weight.values"], content[f"{name}.weight.scales"].view(torch.float8_e4m3fn)
    g = content[f"{name}.weight.scale"]
    return dequantize(Packed(values, scales, g * 6 * 448, "static_6"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["longlive", "modelopt"])
@pytest.mark.parametrize("rule", RULE_LIMITS)
def test_weights_that_came_in_4_bits_are_packed_to_the_same_values(rule: str, order: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 192) * torch.logspace(-3, 0, 256)[:, None]
    source = quantize(weight, rule=rule, order=order)
    wanted = dequantize(source, order=order)
    form = WeightFormat(rule, order, amax=float(source.amax))
    again = form.pack(wanted.to(dtype), form.amax_of(wanted))
    assert torch.equal(dequantize(again, order=order), wanted)
    assert torch.equal(again.amax, source.amax)
    if rule != "static_6":  # as before the rule was honoured: other values
        assert not torch.allclose(fake_quantize(wanted), wanted, rtol=1e-3, atol=0)


def test_tiles_repeat_their_scale_and_never_straddle_pieces() -> None:
    form, weight = WeightFormat(block_2d=True), torch.randn(1 << 12, 512)  # more than one piece
    packed = form.pack(weight, form.amax_of(weight))
    whole = quantize(weight, block_2d=True)
    assert torch.equal(packed.values, whole.values) and torch.equal(
        packed.scales.view(torch.uint8), whole.scales.view(torch.uint8)
    )
    tiles = packed.scales.view(torch.uint8).unflatten(0, (-1, 16))
    assert (tiles == tiles[:, :1]).all()
    turned = form.pack(weight.T.contiguous(), form.amax_of(weight))
    assert torch.equal(dequantize(turned), dequantize(packed).T)


FORMATS = {
    "tiles": WeightFormats(WeightFormat(block_2d=True)),
    "four over six": WeightFormats(WeightFormat("mse")),
    "packed": WeightFormats(own={NAME: WeightFormat("mse", "longlive", amax=0.5)}),
}


@pytest.mark.parametrize("precision", ["w4a16", "nvfp4"])
@pytest.mark.parametrize("kind", FORMATS)
def test_files_hold_what_the_oracle_computes_with(
    small_models: Models, small_graphs: PlainGraphs, kind: str, precision: str
) -> None:
    models = replace(small_models, formats=FORMATS[kind])
    weights, names = weights_from_models(models), quantized_linears(models.dit)
    model = small_graphs.graph("dit", recipe_named(RECIPES[precision]))
    lowered = lower(model, precision, names, weights.amax)
    content = dict(stored_tensors(model, weights.of("dit"), precision, lowered, weights.amax, weights.formats))
    oracle = apply_precision(models, precision).dit
    for name in ("blocks.0.self_attn.q", NAME):
        form, linear = models.formats.of(name), oracle.get_submodule(name)
        wanted = linear.weight if precision == "w4a16" else linear.weight_quantizer(linear.weight)
        assert torch.allclose(decoded(content, name), wanted.detach(), rtol=1e-6, atol=1e-9), (name, form)
    default = packed_weight(precision, NAME, weights.of("dit")[f"{NAME}.weight"], weights.amax)
    assert not torch.equal(default[f"{NAME}.weight.values"], content[f"{NAME}.weight.values"])


def test_a_checkpoint_says_how_its_weights_were_trained(small_models: Models, tmp_path: Path) -> None:
    preset = replace(small_models.preset, name="small")
    modules = {"dit": small_models.dit, "vae": small_models.vae, "text_encoder": small_models.text}
    record = {"nvfp4": {"weight": {"rule": "mse", "order": "modelopt", "block_2d": True}},
              "packed": {"rule": "mse", "order": "longlive", "amax": {NAME: 0.25}}}  # fmt: skip
    for name, module in modules.items():
        facts = {"vocabulary": list(small_models.vocabulary)} if name == "text_encoder" else record
        side = SideFile.of({"kind": name, "preset": "small", **facts})
        save_checkpoint(tmp_path / f"{name}.safetensors", module.state_dict(), side)
    wanted = WeightFormats(WeightFormat("mse", block_2d=True), {NAME: WeightFormat("mse", "longlive", amax=0.25)})
    assert load_models(preset, tmp_path).formats == wanted == weights_from_folder(preset, tmp_path).formats


def test_no_record_is_what_it_always_was() -> None:
    assert formats_from_meta({}).of("any") == WeightFormat("static_6", "modelopt", False, None)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"nvfp4": {"weight": {"rule": "best"}}}, "unknown NVFP4 weight rule"),
        ({"nvfp4": {"weight": {"tiles": True}}}, "can't be read"),
        ({"nvfp4": {"weight": 4}}, "can't be read"),
        ({"packed": {"amax": {"a": "much"}}}, "can't be read"),
        ({"packed": ["a"]}, "can't be read"),
    ],
)
def test_bad_records(meta: dict, message: str) -> None:
    with pytest.raises((IntegrityError, LongtakeError), match=message):
        formats_from_meta(meta)
