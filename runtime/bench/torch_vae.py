"""Our VAE decoder as plain PyTorch does it best: bf16, cuDNN picking its algorithms, norms as the released code has them.

Two variants, both measured: the contiguous layout, and channels last, which cuDNN prefers and the reshapes do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.runtime.backends.base import State
from longtake.training.models.wan.vae import CausalVAE, DecoderFirst, DecoderSteady, RMSNorm


class StockNorm(nn.Module):
    """RMS norm over channels in bf16, x / |x| * sqrt(C) * gamma: what Wan's own code calls."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        channels = norm.gamma.numel()
        self.gain = nn.Parameter(norm.gamma.reshape(-1, 1, 1, 1) * math.sqrt(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1) * self.gain


class LastNorm(nn.Module):
    """The same for channels last: one fused kernel over the contiguous channels."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.gamma = nn.Parameter(norm.gamma.flatten(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        normal = functional.rms_norm(x.permute(0, 2, 3, 4, 1), self.gamma.shape, self.gamma, 1e-12)
        return normal.permute(0, 4, 1, 2, 3)


def with_fast_norms(vae: CausalVAE, channels_last: bool) -> CausalVAE:
    """Replace the decoder's norms and, for channels last, lay its filters out so; in place."""
    kind = LastNorm if channels_last else StockNorm
    for module in list(vae.decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, kind(child))
    if channels_last:
        vae.decoder.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return vae


class DecoderState(State):
    """The caches of one video, by number, as the last call returned them: nothing is copied for PyTorch's side."""

    def __init__(self) -> None:
        super().__init__({})


class PlainDecoder:
    """Streaming decode, one latent a call, with the caches handed from call to call."""

    def __init__(self, vae: CausalVAE) -> None:
        self.first, self.steady = DecoderFirst(vae), DecoderSteady(vae)

    def decode(self, latent_BCFHW: Tensor, state: DecoderState, first: bool) -> Tensor:
        """Frames fp32 [1, 3, T, H, W] of a latent fp32 [1, C, 1, H, W]; its caches go into `state`."""
        step = self.first(latent_BCFHW) if first else self.steady(latent_BCFHW, *state.tensors.values())
        frames, *caches = step
        state.tensors = {str(i): cache for i, cache in enumerate(caches)}
        result: Tensor = frames
        return result
