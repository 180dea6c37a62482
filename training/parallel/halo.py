"""A rank's latents of a clip without encoding the whole clip: its window of frames, and enough of the past before it.

The causal encoder looks back a finite way. A window that starts that much earlier gives the very latents that the whole
clip would, once those of the start (which see zeros where the clip has frames) are dropped. The window begins with the
last frame of a latent, so that the groups of four stay aligned; that frame makes a latent of its own, dropped too.

Legend: F latent frames of the clip, T = 1 + 4 (F - 1) pixel frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.models.presets import VAEConfig
from longtake.training.models.wan.vae import CausalVAE


@dataclass(frozen=True)
class Window:
    """Pixel frames `start` to `stop` of a clip, and how many of their first latents to drop."""

    start: int
    stop: int
    drop: int


def halo_needed(config: VAEConfig) -> int:
    """Latents before the first kept one that a window needs for exactly the latents of the whole clip.

    Follows the first frame that an output depends on from the last layer to the first: a residual block looks 4 frames
    back at its own rate (two convolutions of 3), a convolution 2, and output j of a halving of time sees 2j - 2 to 2j.
    """
    residual, conv = 4, 2
    back = conv + 2 * residual  # conv_out, and the two blocks of the middle
    stride = 1
    for level in reversed(range(len(config.dim_mult))):
        if level < len(config.temporal_down) and config.temporal_down[level]:
            back, stride = 2 * back + 2, 2 * stride
        back += residual * config.res_blocks
    back += conv
    # Frame 4k - back must not lie before the window's first frame, 4 (k - halo - 1)
    return max(0, -(-back // stride) - 1)


def window_of(keep_start: int, keep_stop: int, halo: int, stride: int = 4) -> Window:
    """The frames from which latents `keep_start` to `keep_stop` are encoded, with `halo` latents before them."""
    first = max(0, keep_start - halo)
    if first == 0:
        return Window(0, 1 + stride * (keep_stop - 1), keep_start)
    return Window(stride * (first - 1), 1 + stride * (keep_stop - 1), 1 + keep_start - first)


def share(latents: int, ranks: int, rank: int) -> tuple[int, int]:
    """First latent that is `rank`'s, and the first that isn't: the clip in equal parts.

    Raises:
        LongtakeError: it can't be cut into equal parts.
    """
    if latents % ranks:
        what, got = "the clip can't be cut evenly", f"{latents} latents for {ranks} ranks"
        expected, fix = f"a multiple of {ranks}", "cut the clip, or use fewer ranks"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    each = latents // ranks
    return rank * each, (rank + 1) * each


def evened(latents: int, ranks: int, halo: int) -> list[tuple[int, int]]:
    """First and last-but-one latent of each rank's share so that all encode about as many, halo included.

    Rank 0 needs no halo, so it keeps more; a rank's share may be empty where the clip is short.
    """
    for most in range(-(-latents // ranks), latents + 1):
        bounds, start = [], 0
        for _ in range(ranks):
            stop = max((s for s in range(start, latents + 1) if encoded(start, s, halo) <= most), default=start)
            bounds.append((start, stop))
            start = stop
        if start == latents:
            return bounds
    return [(0, latents), *[(latents, latents)] * (ranks - 1)]


def encoded(start: int, stop: int, halo: int) -> int:
    """Latents that a rank computes for those from `start` to `stop`."""
    return 0 if start == stop else stop - start + window_of(start, stop, halo).drop


@torch.no_grad()
def encode_window(vae: CausalVAE, frames: Tensor, window: Window, at_once: int = 4) -> Tensor:
    """The kept latents, [B, F', C, h, w], of a window's frames.

    Args:
        frames: [B, 3, stop - start, H, W], floating in [-1, 1] or uint8.
        at_once: latents encoded in one call; the encoder's caches carry on from there, so only memory depends on it.
    """
    stride = vae.config.stride[0]
    count = 1 + (frames.shape[2] - 1) // stride
    found, histories = [], None
    for start in range(0, count, at_once):
        first, last = max(0, 1 + stride * (start - 1)), 1 + stride * (min(start + at_once, count) - 1)
        part = frames[:, :, first:last]
        part = part if part.is_floating_point() else part.float() / 127.5 - 1
        latents, histories = vae.encode_chunk(part, histories)
        found.append(latents)
    return torch.cat(found, 1)[:, window.drop :]


@torch.no_grad()
def encode_together(vae: CausalVAE, video: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All latents of `video`, fp32 [B, F, C, h, w], on every rank of `group`, which share the work evenly."""
    stride, halo = vae.config.stride[0], halo_needed(vae.config)
    latents = 1 + (video.shape[2] - 1) // stride
    if group is None:
        return encode_window(vae, video, Window(0, video.shape[2], 0))
    start, stop = evened(latents, dist.get_world_size(group), halo)[dist.get_rank(group)]
    height, width = (size // by for size, by in zip(video.shape[3:], vae.config.stride[1:]))
    whole = torch.zeros(len(video), latents, vae.config.z_channels, height, width, device=video.device)
    if stop > start:
        window = window_of(start, stop, halo, stride)
        whole[:, start:stop] = encode_window(vae, video[:, :, window.start : window.stop], window)
    dist.all_reduce(whole, group=group)
    return whole
