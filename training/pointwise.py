"""The DiT's memory-bound arithmetic, all in fp32 between compute-dtype tensors; fused on a GPU when training asks.

Legend: F latent frames, T tokens = F * frame tokens, H heads, D head_dim.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

P = ParamSpec("P")
_fused = False


def fusable(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A pure function that torch.compile turns into one kernel inside `fused(True)`; elsewhere it runs as written."""
    compiled: list[Callable[P, Tensor]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not _fused:
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=True))
        return compiled[0](*args, **kwargs)

    return call


@contextmanager
def fused(enabled: bool) -> Iterator[None]:
    """Inside, fusable functions run as fused kernels if `enabled`."""
    global _fused
    before, _fused = _fused, enabled
    try:
        yield
    finally:
        _fused = before


def fusing_works(device: torch.device) -> bool:
    """Whether torch.compile works on `device`; a machine without a compiler trains without, and is told so."""
    x = torch.ones(2, 8, 16, device=device, requires_grad=True)
    try:
        with fused(True):
            gated_add(x, x, torch.ones(2, 2, 16, device=device)).sum().backward()
    except Exception as error:  # noqa: BLE001  (whatever the compiler stack raises, training can go on)
        logger.warning("training without fused kernels, which is slower: %s", repr(error)[:300])
        return False
    return True


@fusable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised in fp32, cast back, then multiplied by the weight: the order the reference rounds in."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight.to(x.dtype)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LayerNorm over the last dimension in fp32; the result stays fp32."""
    wide = [None if p is None else p.float() for p in (weight, bias)]
    return functional.layer_norm(x.float(), x.shape[-1:], wide[0], wide[1], eps)


@fusable
def modulate(x: Tensor, eps: float, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift in fp32, returned in x's dtype; scale, shift [..., F, dim], x [..., T, dim]."""
    frames = layer_norm(x, eps).unflatten(-2, (scale.shape[-2], -1))
    out = frames * (1 + scale.float().unsqueeze(-2)) + shift.float().unsqueeze(-2)
    return out.flatten(-3, -2).to(x.dtype)


@fusable
def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y in fp32, returned in x's dtype; gate [..., F, dim], x and y [..., T, dim]."""
    frames = y.float().unflatten(-2, (gate.shape[-2], -1)) * gate.float().unsqueeze(-2)
    return (x.float() + frames.flatten(-3, -2)).to(x.dtype)


@fusable
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2j, 2j+1) of `x` [..., T, H, D] by angle j of its token, in fp32; returns x's dtype.

    cos, sin: fp32 [..., T, D/2].
    """
    pairs = x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.reshape(x.shape).to(x.dtype)
