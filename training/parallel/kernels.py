"""Fused attention kernels of PyTorch with forward and backward apart, so that a caller decides what is kept between.

All tensors are [B, H, T, D]; there is no mask and no dropout. `saved` is what the backward pass needs besides the
inputs and the output (log-sum-exp, random state, lengths).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """One fused attention. forward: of q, k, v the output, then `saved`. backward: of the output's gradient, q, k, v, the
    output and `saved` the gradients of q, k and v."""

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


def _cpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)


def _flash_backward(*tensors: Any) -> tuple[Tensor, ...]:
    *given, seed, unused = tensors
    return aten._scaled_dot_product_flash_attention_backward(*given, 0.0, False, seed, unused)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *saved: Any
) -> tuple[Tensor, ...]:
    *lengths, seed, offset = saved
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, False
    )


def _efficient_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, *saved, 0.0, [True, True, True, False]
    )[:3]


KERNELS = {
    # fp32 or bf16 on the CPU
    "cpu": Kernel(aten._scaled_dot_product_flash_attention_for_cpu, _cpu_backward),
    # bf16 or fp16 on a GPU
    "flash": Kernel(lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v)[:-1], _flash_backward),
    # bf16 or fp16 on a GPU, through cuDNN: the fastest on Hopper
    "cudnn": Kernel(
        lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:-1], _cudnn_backward
    ),
    # any floating dtype on a GPU
    "efficient": Kernel(
        lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True), _efficient_backward
    ),
}


def kernel_for(q: Tensor) -> Kernel:
    """The kernel for tensors like q [B, L, H, D]: on the CPU the only one, on a GPU the fastest that takes the dtype."""
    if not q.is_cuda:
        return KERNELS["cpu"]
    if q.dtype not in (torch.bfloat16, torch.float16):
        return KERNELS["efficient"]
    fast = torch.cuda.get_device_capability(q.device) >= (9, 0) and q.shape[-1] % 8 == 0
    return KERNELS["cudnn" if fast else "flash"]
