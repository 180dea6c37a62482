"""One generated chunk. Legend: B = 1, F latent frames, C latent channels, H, W sizes, T video frames."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.runtime.decode import Frames
from longtake.training.models.presets import Preset


@dataclass(repr=False)
class Chunk:
    """latents: fp32 [1, F, C, H, W], normalized. cut: it begins a shot. visible: the chunks it saw, itself last."""

    index: int
    prompt: str
    cut: bool
    shot: int
    latents: Tensor
    visible: tuple[int, ...]
    decoding: Frames | None
    stage_ms: dict[str, float]

    def __repr__(self) -> str:
        return f"<Chunk {self.index}: {self.prompt!r:.60}{', a cut' if self.cut else ''}, saw {self.visible}>"

    @property
    def frames(self) -> np.ndarray:
        """Video frames uint8 [T, H, W, 3]; waits for the decoder, raises its error."""
        if self.decoding is None:
            raise LongtakeError("this session does not decode", fix="make the session with decode=True")
        return self.decoding.result()

    @property
    def finished_at(self) -> float:
        """When the frames were there, on time.perf_counter's clock; waits for them."""
        return self.decoding.finished_at if self.decoding and len(self.frames) else 0.0

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds by stage; "decode" (in parallel with the next chunk) is there once the frames are."""
        decoded = self.decoding is not None and self.decoding.ready
        return {**self.stage_ms, **({"decode": self.decoding.milliseconds} if decoded and self.decoding else {})}


def tensor_of(given: Any, also: str = "") -> Tensor:
    """Latents of torch or numpy as a tensor of their own dtype. Raises LongtakeError, saying what is taken `also`."""
    got = type(given).__name__
    if isinstance(given, np.ndarray):
        got = f"{given.dtype} {given.shape}"
        with contextlib.suppress(TypeError, ValueError):  # a dtype that torch does not know
            given = torch.tensor(np.ascontiguousarray(given))
    if isinstance(given, Tensor):
        return given
    expected, fix = f"{also}latents [1, F, C, h, w] of torch or numpy", "of frames, pass generator.encode(frames)"
    raise LongtakeError("these are no latents", got=got, expected=expected, fix=fix)


def finite(latents: Tensor, what: str) -> Tensor:
    """`latents` in fp32. Raises LongtakeError for inf and nan."""
    latents = latents.to(torch.float32)  # first: torch cannot ask numbers of 8 bits
    if not bool(latents.isfinite().all()):
        fix = "encode the clip again"
        raise LongtakeError(f"{what} are not all finite", got="inf or nan", expected="numbers", fix=fix)
    return latents


def given_chunk(given: Tensor | np.ndarray, preset: Preset, chunk: int) -> Tensor:
    """Latents [1, F, C, H, W] of chunk `chunk` as the sampler has them, fp32 [1, C, F, H, W].

    Raises:
        LongtakeError: they are not one chunk of this preset.
    """
    latents_BFCHW, frames = tensor_of(given), preset.frames_of(chunk)
    wanted = (1, frames, preset.vae.z_channels, *preset.latent_hw)
    if tuple(latents_BFCHW.shape) != wanted or not latents_BFCHW.is_floating_point():
        got = f"{latents_BFCHW.dtype} {tuple(latents_BFCHW.shape)}"
        fix = f"cut the video into chunks of {frames} latents"
        raise LongtakeError("these latents are not a chunk", got=got, expected=f"{wanted}, floats", fix=fix)
    return latents_BFCHW.to(torch.float32).transpose(1, 2).contiguous()
