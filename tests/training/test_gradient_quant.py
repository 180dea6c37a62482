from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.plugins.nvfp4.formats import E2M1_VALUES
from longtake.plugins.nvfp4.reference import fake_quantize
from longtake.plugins.nvfp4.weight_format import WeightFormat
from longtake.training.models.presets import Preset
from longtake.training.models.quantize import RULES, Rules, insert_quantizers, read_amax
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.objective.gradient_quant import along_tokens, hadamard, quantize_gradients, round_stochastically

NAME = "blocks.0.ffn.0"


class Only(nn.Module):
    """A DiT's blocks; `run` feeds one linear, which is enough to calibrate it."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        torch.manual_seed(1)
        whole = CausalDiT(preset.dit)
        self.blocks, self.family = whole.blocks, whole.family


def run(dit: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in list(dit.modules()):
        if isinstance(module, nn.Linear):
            module(torch.randn(32, module.in_features, generator=generator))


def quantized(preset: Preset, rules: Rules) -> nn.Module:
    dit = Only(preset)
    insert_quantizers(dit, run, rules=rules)  # type: ignore[arg-type]
    return dit


def test_stochastic_rounding_gives_neighbours_and_is_unbiased() -> None:
    torch.manual_seed(0)
    x = torch.tensor([0.0, 0.1, -0.3, 0.5, 1.7, -2.2, 2.9, 3.5, -4.5, 5.9, 6.0, 7.0, -9.0])
    drawn = round_stochastically(x.expand(40_000, -1))
    assert set(drawn.unique().tolist()) <= set(E2M1_VALUES.tolist())
    assert torch.allclose(drawn.mean(0), x.clamp(-6, 6), atol=0.02)
    grid = E2M1_VALUES[:8]
    for value, column in zip(x.clamp(-6, 6).tolist(), drawn.T):
        around = {float(grid[grid <= abs(value)].max()), float(grid[grid >= abs(value)].min())}
        assert set(column.abs().unique().tolist()) <= around
    assert len(drawn[:, 1].unique()) == 2 and len(drawn[:, 3].unique()) == 1


def test_four_over_six_decides_by_what_was_drawn() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    six, four, both = (fake_quantize(x, rule=r, order="longlive") for r in ("static_6", "static_4", "mse"))
    drawn = fake_quantize(x, rule="mse", order="longlive", rounding=lambda y: y.sign() * y.abs().clamp(max=6).floor())
    assert len({float((y - x).norm()) for y in (six, four, both, drawn)}) == 4
    assert torch.equal(fake_quantize(x, rule="mse", rounding=torch.zeros_like), torch.zeros_like(x))


def test_hadamard_is_orthogonal_and_cancels_in_the_product() -> None:
    matrix = hadamard(torch.device("cpu"))
    assert torch.allclose(matrix @ matrix.T, torch.eye(16), atol=1e-6)
    assert matrix.abs().eq(0.25).all() and (matrix[:, 0] * 4).tolist() == [1, 1, 1, -1, 1, *[-1] * 6, 1, -1, 1, -1, -1]
    dy, x = torch.randn(37, 32), torch.randn(37, 48)  # 37 tokens: the last group is filled up
    assert torch.allclose(along_tokens(dy) @ along_tokens(x).T, dy.T @ x, atol=1e-4)


@pytest.mark.parametrize("name", ["static_6", "longlive-ar"])
def test_forward_is_unchanged_and_the_weight_gradient_has_the_stated_form(small_preset: Preset, name: str) -> None:
    rules = RULES[name]
    plain = quantized(small_preset, rules)
    emulated = copy.deepcopy(plain)
    quantize_gradients(emulated, rules)
    x = torch.randn(2, 48, plain.get_submodule(NAME).in_features)  # type: ignore[operator]
    upstream = torch.randn(2, 48, plain.get_submodule(NAME).out_features)  # type: ignore[operator]
    outs, grads = [], []
    for dit in (plain, copy.deepcopy(emulated)):  # a copy must compute with its own weights
        leaf, linear = x.clone().requires_grad_(), dit.get_submodule(NAME)
        out = linear(leaf)
        torch.manual_seed(7)
        out.backward(upstream)
        outs.append(out.detach())
        grads.append((leaf.grad, linear._parameters["weight"].grad, linear.bias.grad))  # type: ignore[union-attr]
    assert torch.equal(*outs)
    assert emulated.get_submodule(NAME)._parameters["weight"].grad is None
    for wanted, got in zip(*grads):
        assert got is not None and got.isfinite().all() and got.shape == wanted.shape
    assert torch.allclose(grads[0][2], grads[1][2], rtol=1e-5, atol=1e-4)  # the bias's isn't quantized
    for wanted, got in zip(grads[0][:2], grads[1][:2]):
        error = float((wanted - got).norm() / wanted.norm())
        assert 0.02 < error < 0.35

    torch.manual_seed(7)
    amax, linear = read_amax(plain)[NAME], plain.get_submodule(NAME)
    dy = upstream.flatten(0, 1)
    x_q = fake_quantize(x.flatten(0, 1), rule=rules.input, amax=amax["input"])
    rows = fake_quantize(dy, rule=rules.gradient, rounding=round_stochastically)
    columns = fake_quantize(along_tokens(dy), rule=rules.gradient, rounding=round_stochastically)
    assert torch.allclose(grads[1][1], columns @ fake_quantize(along_tokens(x_q), rule=rules.gradient).T, atol=1e-4)
    weight = linear._parameters["weight"].detach()
    if name == "longlive-ar":
        back = fake_quantize(weight, amax=amax["weight"], block_2d=True)
        assert torch.equal(back, fake_quantize(weight.T.contiguous(), amax=amax["weight"], block_2d=True).T)
    else:
        back = fake_quantize(weight.T.contiguous(), amax=amax["weight"]).T
        assert not torch.equal(back, fake_quantize(weight, amax=amax["weight"]))
    assert torch.allclose(grads[1][0].flatten(0, 1), rows @ back, atol=1e-4)


def test_the_weight_gradient_is_right_on_average(small_preset: Preset) -> None:
    rules = Rules(weight=WeightFormat(block_2d=True))
    dit = quantized(small_preset, rules)
    linear = dit.get_submodule(NAME)
    x, upstream = torch.randn(64, 64), torch.randn(64, 128)
    linear(x).backward(upstream)
    weight = linear._parameters["weight"]
    wanted, weight.grad = weight.grad, None
    quantize_gradients(dit, rules)
    errors = []
    for draws in (1, 40):
        weight.grad = None
        for _ in range(draws):
            linear(x).backward(upstream / draws)
        errors.append(float((weight.grad - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.6 * errors[0]  # what stays is the rounding of X, which isn't random


def test_under_autocast_and_without_gradients(small_preset: Preset) -> None:
    rules = RULES["longlive-dmd"]
    dit = quantized(small_preset, rules)
    quantize_gradients(dit, rules)
    linear = dit.get_submodule(NAME)
    with torch.autocast("cpu", torch.bfloat16):
        out: Tensor = linear(torch.randn(16, 64))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and linear._parameters["weight"].grad.dtype == torch.float32
    with torch.no_grad():
        assert linear(torch.randn(3, 64)).shape == (3, 128)


def test_without_quantizers_is_an_error(small_preset: Preset) -> None:
    with pytest.raises(LongtakeError, match="where weights and activations are") as caught:
        quantize_gradients(Only(small_preset), Rules())
    assert "--precision nvfp4" in str(caught.value)


@pytest.mark.gpu
def test_a_captured_step_draws_anew(small_preset: Preset) -> None:
    rules = RULES["longlive-ar"]
    dit = quantized(small_preset, rules)
    quantize_gradients(dit, rules)
    linear = dit.get_submodule(NAME).cuda()
    captured = torch.cuda.make_graphed_callables(linear, (torch.randn(32, 64, device="cuda", requires_grad=True),))
    x, upstream, grads = torch.randn(32, 64, device="cuda"), torch.randn(32, 128, device="cuda"), []
    for seed in (1, 2, 1):
        linear.zero_grad()  # to None: what a graph hands out is its own buffer, which the next replay writes over
        torch.manual_seed(seed)
        captured(x.clone().requires_grad_()).backward(upstream)
        grads.append(linear._parameters["weight"].grad.clone())
    assert not torch.equal(grads[0], grads[1]) and torch.allclose(grads[0], grads[2])
