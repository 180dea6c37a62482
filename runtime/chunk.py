"""One generated chunk. Legend: B = 1, F latent frames, C latent channels, H, W sizes, T video frames."""

from __future__ import annotations

from dataclasses import dataclass

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


def given_chunk(latents_BFCHW: Tensor, preset: Preset, chunk: int) -> Tensor:
    """Latents [1, F, C, H, W] of chunk `chunk` as the sampler has them, fp32 [1, C, F, H, W].

    Raises:
        LongtakeError: they are not one chunk of this preset.
    """
    frames = preset.frames_of(chunk)
    wanted = (1, frames, preset.vae.z_channels, *preset.latent_hw)
    if tuple(latents_BFCHW.shape) != wanted:
        fix = f"cut the video into chunks of {frames} latents"
        raise LongtakeError("these latents are not a chunk", got=tuple(latents_BFCHW.shape), expected=wanted, fix=fix)
    return latents_BFCHW.to(torch.float32).transpose(1, 2).contiguous()
