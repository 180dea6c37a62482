from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.plugins.cross_attention.reference import dense_cross_attention
from longtake.plugins.fp8 import multiplier, quantized_rows
from longtake.plugins.nvfp4.reference import fake_quantize
from longtake.plugins.nvfp4.weight_format import WeightFormat, WeightFormats
from longtake.training.models.load import Models
from longtake.training.models.presets import Preset
from longtake.training.models.quantize import (
    RULES,
    Rules,
    apply_precision,
    insert_quantizers,
    quantizers,
    read_amax,
    recalibrate,
    restore_quantizers,
)
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.linears import quantized_linears
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid


class Run:
    """One uncached pass over fixed random inputs."""

    def __init__(self, preset: Preset) -> None:
        generator = torch.Generator().manual_seed(0)
        config = preset.dit
        self.latents = torch.randn(config.channels, 2, *preset.latent_hw, generator=generator)
        self.text = torch.randn(config.text_len, config.text_dim, generator=generator)
        self.sinusoid = timestep_sinusoid([937.0] * 2, config.freq_dim)
        self.rope = rope_tables(config, [0, 1], preset.grid_hw)

    def __call__(self, dit: nn.Module) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dense_cross_attention(q, torch.stack((k, v)))

        context = dit.context(self.text)
        return dit(self.latents, self.sinusoid, self.rope, context, attend, cross=dense_cross_attention)


@pytest.fixture
def run(small_preset: Preset) -> Run:
    return Run(small_preset)


@pytest.fixture
def plain(small_preset: Preset) -> CausalDiT:
    torch.manual_seed(1)
    dit = CausalDiT(small_preset.dit)
    nn.init.xavier_uniform_(dit.head.head.weight)
    return dit


@pytest.mark.parametrize("precision", ["nvfp4", "fp8"])
def test_exactly_the_listed_linears_are_quantized(plain: CausalDiT, run: Run, precision: str) -> None:
    dit = insert_quantizers(copy.deepcopy(plain), run, precision)
    enabled = {n.rpartition(".")[0] for n, m in dit.named_modules() if n.endswith("_quantizer") and m.is_enabled}
    assert enabled == set(quantized_linears(plain)) and len(enabled) == 10 * len(plain.blocks)


def test_one_linear_computes_with_our_codec_bit_for_bit(plain: CausalDiT, run: Run) -> None:
    dit = insert_quantizers(copy.deepcopy(plain), run)
    name = "blocks.1.ffn.0"
    amax, linear = read_amax(dit)[name], plain.get_submodule(name)
    x = torch.randn(5, linear.in_features)
    wanted = nn.functional.linear(
        fake_quantize(x, amax=amax["input"]), fake_quantize(linear.weight, amax=amax["weight"]), linear.bias
    )
    assert torch.equal(dit.get_submodule(name)(x), wanted)


def test_forward_is_near_and_gradients_reach_every_weight(plain: CausalDiT, run: Run) -> None:
    wanted = run(plain).detach()
    dit = insert_quantizers(plain, run)
    out = run(dit)
    error = float((out - wanted).norm() / wanted.norm())
    assert 1e-3 < error < 0.15
    out.square().mean().backward()
    for name in quantized_linears(dit):
        grad = dit.get_submodule(name).weight.grad
        assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0, name


def test_gradient_is_straight_through(plain: CausalDiT, run: Run) -> None:
    linear = insert_quantizers(plain, run).get_submodule("blocks.0.ffn.2")
    x = torch.randn(3, linear.in_features, requires_grad=True)
    linear(x).sum().backward()
    amax = read_amax(plain)["blocks.0.ffn.2"]
    assert torch.allclose(x.grad, fake_quantize(linear.weight, amax=amax["weight"]).sum(0).expand_as(x), atol=1e-5)


def test_calibrating_again_follows_weights_that_outgrew_their_amax_and_back(plain: CausalDiT, run: Run) -> None:
    dit = insert_quantizers(plain, run)
    weight = dit.get_submodule("blocks.0.self_attn.q").weight
    before = read_amax(dit)["blocks.0.self_attn.q"]["weight"]
    with torch.no_grad():
        weight.mul_(3)
    assert read_amax(dit)["blocks.0.self_attn.q"]["weight"] == before
    recalibrate(dit, run)
    assert read_amax(dit)["blocks.0.self_attn.q"]["weight"] == float(weight.abs().max()) > 2.9 * before
    with torch.no_grad():
        weight.div_(3)
    recalibrate(dit, run)
    assert read_amax(dit)["blocks.0.self_attn.q"]["weight"] == float(weight.abs().max()) < 1.1 * before


@pytest.mark.parametrize("precision", ["nvfp4", "fp8"])
def test_stored_amax_rebuilds_the_same_model(plain: CausalDiT, run: Run, precision: str) -> None:
    dit = insert_quantizers(copy.deepcopy(plain), run, precision)
    rebuilt = restore_quantizers(copy.deepcopy(plain), read_amax(dit), precision)
    assert torch.equal(run(rebuilt), run(dit))


def test_amax_calibrated_for_nvfp4_serves_fp8(plain: CausalDiT, run: Run) -> None:
    found = [read_amax(insert_quantizers(copy.deepcopy(plain), run, precision)) for precision in ("nvfp4", "fp8")]
    assert found[0] == found[1]


def test_fp8_scales_activations_by_the_calibrated_amax_and_weights_by_row(plain: CausalDiT, run: Run) -> None:
    name = "blocks.1.ffn.0"
    with torch.no_grad():
        plain.get_submodule(name).weight[3] *= 1000  # an outlier row costs the other rows nothing
    dit = insert_quantizers(copy.deepcopy(plain), run, "fp8")
    linear, amax = plain.get_submodule(name), read_amax(dit)[name]["input"]
    x = torch.randn(5, linear.in_features) * 3
    x[0, 0] = 2 * amax  # beyond what calibration saw: saturates
    codes, scales = quantized_rows(linear.weight)
    factor = multiplier(torch.tensor(amax))
    rounded = (x * factor).clamp(-448, 448).to(torch.float8_e4m3fn).float() / factor
    wanted = nn.functional.linear(rounded, codes.float() * scales[:, None], linear.bias)
    assert torch.allclose(dit.get_submodule(name)(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    errors = (codes.float() * scales[:, None] - linear.weight).norm(dim=1) / linear.weight.norm(dim=1)
    assert 0.01 < float(errors.max()) < 0.04


def test_missing_amax_says_what_to_run(plain: CausalDiT) -> None:
    with pytest.raises(LongtakeError, match="no activation amax") as caught:
        restore_quantizers(plain, {})
    assert "--precision nvfp4" in str(caught.value)


def test_precisions_leave_the_models_untouched(plain: CausalDiT, run: Run, small_preset: Preset) -> None:
    amax = read_amax(insert_quantizers(copy.deepcopy(plain), run))
    models = Models(small_preset, plain, nn.Identity(), nn.Identity(), amax)  # type: ignore[arg-type]
    before = run(plain)
    weight_only, both, eight = (apply_precision(models, precision) for precision in ("w4a16", "nvfp4", "fp8"))
    assert torch.equal(run(models.dit), before) and torch.equal(run(apply_precision(models, "bf16").dit), before)
    name = "blocks.0.cross_attn.k"
    assert torch.equal(weight_only.dit.get_submodule(name).weight, fake_quantize(plain.get_submodule(name).weight))
    errors = [float((run(m.dit) - before).norm() / before.norm()) for m in (eight, weight_only, both)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.15
    assert quantizers(both.dit)[name]["input"].is_enabled


@pytest.mark.parametrize("name", RULES)
def test_a_linear_computes_by_the_rules_asked_for_and_its_gradient_is_straight_through(
    plain: CausalDiT, run: Run, name: str
) -> None:
    rules, linear_name = RULES[name], "blocks.1.ffn.0"
    dit = insert_quantizers(copy.deepcopy(plain), run, rules=rules)
    amax, linear = read_amax(dit)[linear_name], plain.get_submodule(linear_name)
    x = torch.randn(5, linear.in_features, requires_grad=True)
    form = rules.weight
    weight = fake_quantize(linear.weight, rule=form.rule, amax=amax["weight"], block_2d=form.block_2d)
    wanted = nn.functional.linear(fake_quantize(x, rule=rules.input, amax=amax["input"]), weight, linear.bias)
    out = dit.get_submodule(linear_name)(x)
    assert torch.equal(out, wanted)
    out.sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-5)
    assert dit.get_submodule(linear_name)._parameters["weight"].grad.abs().sum() > 0


def test_weights_in_tiles_quantize_like_their_transpose(plain: CausalDiT, run: Run) -> None:
    dit = insert_quantizers(plain, run, rules=Rules(weight=WeightFormat("mse", block_2d=True)))
    linear = dit.get_submodule("blocks.0.ffn.0")
    weight = linear._parameters["weight"].detach()
    straight, turned = linear.weight_quantizer(weight), linear.weight_quantizer(weight.T.contiguous())
    assert torch.equal(straight, turned.T) and not torch.equal(straight, weight)


def test_amax_follows_under_other_rules_and_restores_the_same_weights(plain: CausalDiT, run: Run) -> None:
    rules = Rules(weight=WeightFormat("mse", block_2d=True))
    dit = insert_quantizers(copy.deepcopy(plain), run, rules=rules)
    with torch.no_grad():
        dit.get_submodule("blocks.0.self_attn.q")._parameters["weight"].mul_(3)
    recalibrate(dit, run)
    amax = read_amax(dit)
    assert amax["blocks.0.self_attn.q"]["weight"] == 3 * float(plain.blocks[0].self_attn.q.weight.detach().abs().max())
    with torch.no_grad():
        plain.blocks[0].self_attn.q.weight.mul_(3)
    rebuilt = restore_quantizers(copy.deepcopy(plain), amax, formats=WeightFormats(rules.weight))
    assert torch.equal(run(rebuilt), run(dit))


@pytest.mark.gpu
def test_gpu_quantizer_agrees_with_the_codec(plain: CausalDiT, run: Run) -> None:
    linear = insert_quantizers(plain, run).get_submodule("blocks.0.ffn.0").cuda()
    x = torch.randn(64, linear.in_features).bfloat16()
    quantizer = linear.input_quantizer
    assert torch.equal(quantizer(x.cuda()).cpu(), fake_quantize(x, amax=float(quantizer.amax)))
    linear(x.cuda().float()).sum().backward()
    assert linear.weight.grad.isfinite().all()
