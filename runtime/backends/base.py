"""What a backend is: the networks of one recipe on one device, with their state in place.

Legend: B = 1, F latent frames of a chunk, C latent channels, H, W latent size, E text length, T video frames.
Every tensor is a torch tensor on `Backend.device`, except where said. A backend raises LongtakeError when it cannot be
had; anything it raises during a call leaves no trace the session would read: see `Backend.dit`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from longtake.formats.recipe import Recipe
from longtake.training.models.presets import Preset

# One tuple a layer, tensors in the order of plugins.spec.cache_tensors(recipe.cache).
Cache = list[tuple[Tensor, ...]]


class Decoder(Protocol):
    """Streaming VAE decoder of one video: one latent frame in, one (the first) or four video frames out."""

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Normalized latent fp32 [1, C, H, W] to frames fp32 [3, T, H, W] in [-1, 1]; advances the state.

        The result may be a buffer that the next call overwrites.
        """
        ...

    def state(self) -> list[Tensor]:
        """The feature caches, not copied; an empty list before the first latent."""
        ...

    def load_state(self, tensors: list[Tensor]) -> None:
        """Continue from `tensors` (any device, any float dtype), copied; an empty list starts a new video."""
        ...


class Encoder(Protocol):
    """Streaming VAE encoder of one video: one video frame in (the first) or four, one latent frame out."""

    def encode(self, frames_CTHW: Tensor) -> Tensor:
        """Frames fp32 [3, T, H, W] in [-1, 1], any device, T = 1 at the start and 4 after it; advances the state.

        Returns the normalized latent, the distribution's mean, fp32 [1, C, h, w]; the next call may overwrite it.
        """
        ...


class Backend(Protocol):
    """The networks of one recipe, ready to run.

    name: "reference", "segmented" or "fused" (tests add their own). reason: why this one was chosen, one clause.
    A backend whose decoder runs on another device says which one in `decode_device` (see `decode_device_of`).
    """

    name: str
    reason: str
    device: torch.device
    preset: Preset
    recipe: Recipe

    def text(self, tokens: Tensor) -> Tensor:
        """Token ids int32 [1, E] to embeddings fp32 [1, E, text_dim]; rows of padding are zero."""
        ...

    def context(self, embeddings: Tensor) -> list[Tensor]:
        """Embeddings to each layer's cross-attention K and V, [2, E, heads, head_dim]. The caller keeps them."""
        ...

    def new_cache(self) -> Cache:
        """Allocate one zeroed K/V cache. Its tensors are used in place and never move."""
        ...

    def dit(
        self,
        latents_BCFHW: Tensor,
        sinusoid: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        context: list[Tensor],
        cache: Cache,
        table: Tensor,
        write_slot: Tensor,
    ) -> Tensor:
        """One DiT pass: velocity fp32 [1, C, F, H, W], which the next call may overwrite.

        Args:
            latents_BCFHW: fp32 [1, C, F, H, W].
            sinusoid: timestep embedding input, fp32 [F, freq_dim].
            rope_cos, rope_sin: fp32 [tokens, head_dim / 2].
            context: what `context` returned for the prompt.
            cache: what `new_cache` returned. With `write_slot` -1 it is only read; otherwise slot `write_slot` of every
                layer is overwritten and no other, so that a pass that fails half-way damages at most that slot.
            table: slots to read, int32 [W], 1 <= W <= window_chunks; -1 is the current block's own fresh K/V.
            write_slot: int32 [1], on the host: a backend can tell reading from writing without waiting for the device.
        """
        ...

    def new_decoder(self) -> Decoder:
        """A decoder at the start of a video."""
        ...

    def new_encoder(self) -> Encoder:
        """An encoder at the start of a video. It may hold device memory for as long as it is referenced.

        Raises:
            LongtakeError: this backend has no VAE encoder; says what would give it one.
        """
        ...

    def peak_bytes(self) -> int:
        """Peak memory so far in bytes: device memory on a GPU, resident memory of the process on a CPU."""
        ...

    def close(self) -> None:
        """Release engines and buffers. Calling it twice is harmless."""
        ...


def decode_device_of(backend: Backend) -> torch.device:
    """Where `backend` decodes: its `decode_device` if it has one, else its device."""
    return getattr(backend, "decode_device", None) or backend.device


def encode_video(encoder: Encoder, frames_CTHW: Tensor) -> Tensor:
    """The start of a video, fp32 [3, 1 + 4 (F - 1), H, W] in [-1, 1], to latents fp32 [1, F, C, h, w] on the CPU."""
    groups = [frames_CTHW[:, :1], *frames_CTHW[:, 1:].split(4, dim=1)]
    return torch.stack([encoder.encode(group).cpu().clone() for group in groups if group.shape[1]], dim=1)
