from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtake.training.models.wan.window import full_history, window_history
from longtake.training.parallel.attention import attend_seen
from longtake.training.parallel.kernels import KERNELS, Kernel
from longtake.training.parallel.layout import NONE, Layout

TOKENS, HEADS, DIM = 6, 2, 16


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain attention under a mask over blocks, bool [B or 1, S, S]."""
    tokens = mask.repeat_interleave(TOKENS, -1).repeat_interleave(TOKENS, -2)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=tokens).transpose(1, 2)


@pytest.mark.parametrize("layout", [Layout(NONE, 6, 1), Layout("balanced", 6, 2), Layout("naive", 6, 2)])
def test_output_and_gradients_are_those_of_masked_attention(layout: Layout) -> None:
    histories = torch.stack([full_history(6), window_history([False, False, True, False, False, True], 4)])
    mask = layout.mask(histories)
    q, k, v = (random("cpu", torch.float32, 2, mask.shape[-1] * TOKENS, HEADS, DIM) for _ in range(3))
    with torch.no_grad():
        k.mul_(0.7), v.add_(0.3)
    got = attend_seen(q, k, v, [layout.seen(h, complete=True) for h in histories])
    wanted = masked(q, k, v, mask)
    weights = torch.randn_like(wanted)
    ours = torch.autograd.grad((got * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    for one, other in zip((got, *ours), (wanted, *theirs)):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_skipped_block_is_zero_and_gives_no_gradient() -> None:
    layout = Layout("balanced", 2, 2)
    q, k, v = (random("cpu", torch.float32, 1, 4 * TOKENS, HEADS, DIM) for _ in range(3))
    out = attend_seen(q, k, v, [layout.seen(full_history(2))])
    skipped = slice(2 * TOKENS, 3 * TOKENS)  # [c0 n0 | c1 n1]
    assert not out[:, skipped].any() and out[:, : 2 * TOKENS].any()
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert not grad[:, skipped].any()


def talkative() -> Kernel:
    """Keeps lengths and absent tensors too, as the kernels of a GPU do."""
    plain = KERNELS["cpu"]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        out, lse = plain.forward(q, k, v)
        return out, None, lse, k.shape[2], None

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *saved: Any) -> tuple[Tensor, ...]:
        assert saved[0] is None and saved[3] is None and saved[2] == k.shape[2]
        return plain.backward(grad, q, k, v, out, saved[1])

    return Kernel(forward, backward)


def test_what_a_kernel_keeps_comes_back_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [Layout("balanced", 2, 2).seen(full_history(2))]
    q, k, v = (random("cpu", torch.float32, 1, 4 * TOKENS, HEADS, DIM) for _ in range(3))
    wanted = torch.autograd.grad(attend_seen(q, k, v, seen).square().sum(), (q, k, v))
    monkeypatch.setattr("longtake.training.parallel.attention.kernel_for", lambda q: talkative())
    for one, other in zip(torch.autograd.grad(attend_seen(q, k, v, seen).square().sum(), (q, k, v)), wanted):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_gpu_s_sequence_is_that_of_the_cpu() -> None:
    layout = Layout("balanced", 4, 2)
    seen = [layout.seen(full_history(4))]
    tensors = [torch.randn(1, 8 * 128, 2, 64, dtype=torch.bfloat16) for _ in range(3)]
    found = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device, torch.float32 if device == "cpu" else x.dtype).requires_grad_() for x in tensors]
        out = attend_seen(*leaves, seen)  # type: ignore[arg-type, misc]
        found.append([x.double().cpu() for x in (out, *torch.autograd.grad(out.float().square().sum(), leaves))])
    for one, other in zip(*found):
        assert (one - other).norm() <= 2e-2 * one.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_a_gpu_s_kernels_agree_with_plain_attention(name: str) -> None:
    kernel = KERNELS[name]
    dtype = torch.float32 if name == "efficient" else torch.bfloat16
    # equal queries and keys would look at themselves only: gradients that cancel, and an output's rounding to bf16 in them
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn((1, n, 2, 128), generator=generator) for n in (256, 512, 512)]
    views: list[Any] = [x.to("cuda", dtype).transpose(1, 2) for x in drawn]
    out, *saved = kernel.forward(*views)
    grad = torch.randn_like(out)
    ours = kernel.backward(grad, *views, out, *saved)
    wide = [x.double().requires_grad_() for x in views]
    wanted = functional.scaled_dot_product_attention(*wide)
    theirs = torch.autograd.grad(wanted, wide, grad.double())
    limit = 1e-3 if name == "efficient" else 2e-2
    for one, other in zip((out, *ours), (wanted, *theirs)):
        assert (one.double() - other).norm() <= limit * other.norm()
