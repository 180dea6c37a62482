"""A VAE decoder whose convolutions run in 8-bit codes beside the same in bf16: calibration, decoding as a stream, PSNR.

Everything goes through the ops' references (PyTorch), a latent at a time, histories kept as an engine keeps them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.training.models.conv_calibration import ConvCalibration
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.vae_codes import CodedConv, Watched, coded_convs
from longtake.training.models.wan.vae_library import LibraryFirst, LibrarySteady

PEAK = 2.0  # frames go from -1 to 1


def in_bf16(vae: CausalVAE) -> CausalVAE:
    """A copy that computes as an engine does: weights in bf16, the latents' statistics as they are."""
    other = copy.deepcopy(vae).bfloat16().eval().requires_grad_(False)
    other.latent_mean, other.latent_std = vae.latent_mean.float(), vae.latent_std.float()
    return other


class DecodedStream:
    """Decodes latent after latent of one clip. coded: convolutions in 8-bit codes, by name."""

    def __init__(self, vae: CausalVAE, coded: Mapping[str, CodedConv] | None = None) -> None:
        self._first = LibraryFirst(vae, coded or {})
        self._steady = LibrarySteady(vae, in_place=True, coded=coded)
        self._caches: Sequence[Tensor] | None = None

    @torch.no_grad()
    def step(self, latent: Tensor) -> Tensor:
        """Latent [1,z,1,h,w], normalized, to its frames fp32 [1,3,T,H,W]."""
        if self._caches is None:
            frames, *self._caches = self._first(latent)
        else:
            frames, *self._caches = self._steady(latent, *self._caches)
        return frames


def frame_psnr(one: Tensor, other: Tensor) -> Tensor:
    """dB of each frame [T] of two clips [1,3,T,H,W] in -1..1; equal frames count as an error of 2^-20 of the peak."""
    error = (one.double() - other.double()).square().mean((0, 1, 3, 4)).clamp(min=(PEAK * 2**-20) ** 2)
    return 10 * torch.log10(PEAK**2 / error)


@torch.no_grad()
def calibrated(vae: CausalVAE, clips: Iterable[Tensor], weights: str = "") -> ConvCalibration:
    """What the decoder's convolutions read while `vae` decodes latents [F,z,h,w]; `weights`: digest of its checkpoint.

    Raises:
        IntegrityError: a convolution reads nothing but zeros, or what is not finite.
    """
    with Watched(vae) as seen:
        for clip in clips:
            vae.decode(clip[None])
    return seen.calibration(weights)


def compared(
    vae: CausalVAE, calibration: ConvCalibration, rows: Sequence[str], latents: Tensor
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Of latents [F,z,h,w], step by step from the second on: the frames in bf16, and the PSNR of each frame against them by
    row, a recipe's `vae_conv`. (The first latent's convolutions run in bf16 here, whatever the row.)"""
    streams = {row: DecodedStream(vae, coded_convs(vae, row, calibration)) for row in ("bf16", *rows)}
    for number in range(latents.shape[0]):
        given = latents[number][None, :, None]
        frames = {row: stream.step(given) for row, stream in streams.items()}
        if number:
            yield frames["bf16"], {row: frame_psnr(frames[row], frames["bf16"]) for row in rows}


def summary(psnr: Sequence[Tensor]) -> dict[str, Any]:
    """Of frames' PSNR: of their mean error, the worst frame's, and how many they are, in dB."""
    every = torch.cat(list(psnr))
    mean = 10 * torch.log10(1 / (10 ** (-every / 10)).mean())
    return {"psnr_db": round(float(mean), 2), "worst_frame_db": round(float(every.min()), 2), "frames": every.numel()}
