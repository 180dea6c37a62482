"""Networks that may not be among a recipe's engines, run by PyTorch instead: the VAE encoder and the text encoder.

Legend: E text length, T video frames, H, W sizes, C latent channels, h, w latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.paths import REPOSITORY
from longtake.training.models.checkpoint import load_into
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset

TextRunner = Callable[[Tensor], Tensor]  # token ids int32 [1, E] -> embeddings fp32 [1, E, text_dim]


def checkpoint_folder(preset: Preset, checkpoints: Path | None) -> Path:
    """`checkpoints`, or the folder that the preset's own lie in."""
    return checkpoints or REPOSITORY / preset.checkpoints


def vae_from_checkpoints(preset: Preset, checkpoints: Path | None) -> Any:
    """The VAE of a folder of checkpoints, on the CPU, in the dtype it has there.

    Raises:
        LongtakeError: it is missing, or of another preset.
        IntegrityError: it is damaged.
    """
    vae = family_of(preset).vae(preset)
    load_into(vae, checkpoint_folder(preset, checkpoints) / "vae.safetensors", kind="vae", preset=preset)
    return vae.eval()


def text_runner(preset: Preset, checkpoints: Path | None, device: torch.device) -> TextRunner:
    """The text encoder of a folder of checkpoints, as a function. Raises what loading it does."""
    from longtake.training.models.text.runner import text_runner_for

    return text_runner_for(preset, checkpoint_folder(preset, checkpoints), device)


class TorchEncoder:
    """Streaming VAE encoder (see video_model.Encoder) in PyTorch, by the VAE's `encode_chunk`."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.vae, self.device = vae.to(device), device
        self._histories: list[Tensor] | None = None

    @torch.no_grad()
    def encode(self, frames_CTHW: Tensor) -> Tensor:
        """See video_model.Encoder.encode."""
        latents, self._histories = self.vae.encode_chunk(frames_CTHW[None].to(self.device), self._histories)
        first: Tensor = latents[:, 0]
        return first
