"""Fused attention kernels of PyTorch with forward and backward apart, so that a caller decides what is kept between.

All tensors are [B, H, T, D]; there is no mask and no dropout. `saved` is what the backward pass needs besides the
inputs and the output (log-sum-exp, random state, lengths).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """One fused attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """Output and `saved`."""

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Any, ...]) -> Gradients:
        """Gradients of q, k and v."""


class CPUFlash:
    """fp32 or bf16 on the CPU."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, (lse,)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Any, ...]) -> Gradients:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, saved[0], 0.0, False)


class Flash:
    """bf16 or fp16 on a GPU."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        out, *saved, _ = aten._scaled_dot_product_flash_attention(q, k, v)
        return out, tuple(saved)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Any, ...]) -> Gradients:
        lse, starts_q, starts_k, most_q, most_k, seed, unused = saved
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, starts_q, starts_k, most_q, most_k, 0.0, False, seed, unused
        )


class CuDNN:
    """bf16 or fp16 on a GPU, through cuDNN: the fastest on Hopper."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        out, *saved, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out, tuple(saved)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Any, ...]) -> Gradients:
        lse, starts_q, starts_k, most_q, most_k, seed, offset = saved
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, starts_q, starts_k, most_q, most_k, 0.0, False
        )


class Efficient:
    """Any floating dtype on a GPU."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        out, *saved = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        return out, tuple(saved)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Any, ...]) -> Gradients:
        lse, seed, offset = saved
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False]
        )
        return dq, dk, dv


KERNELS: dict[str, type[Kernel]] = {"cpu": CPUFlash, "flash": Flash, "cudnn": CuDNN, "efficient": Efficient}


def kernel_for(q: Tensor) -> Kernel:
    """The kernel for tensors like q [B, L, H, D]: on the CPU the only one, on a GPU the fastest that takes the dtype."""
    if not q.is_cuda:
        return CPUFlash()
    if q.dtype not in (torch.bfloat16, torch.float16):
        return Efficient()
    return CuDNN() if torch.cuda.get_device_capability(q.device) >= (9, 0) and q.shape[-1] % 8 == 0 else Flash()
