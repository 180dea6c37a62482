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

from longtake.runtime.errors import LongtakeError
from longtake.training.presets import VAEConfig
from longtake.training.vae import CausalVAE

REFERENCE_HALO = 28  # what LongLive takes for the Wan 2.2 VAE, one more than its structure needs


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
        raise LongtakeError(
            "the clip can't be cut evenly",
            got=f"{latents} latents for {ranks} ranks",
            expected=f"a multiple of {ranks}",
            fix="cut the clip, or use fewer ranks",
        )
    each = latents // ranks
    return rank * each, (rank + 1) * each


@torch.no_grad()
def encode_window(vae: CausalVAE, frames: Tensor, window: Window) -> Tensor:
    """The kept latents, [B, F', C, h, w], of a window's frames fp32 [B, 3, stop - start, H, W]."""
    return vae.encode(frames)[:, window.drop :]


def encode_share(vae: CausalVAE, video: Tensor, ranks: int, rank: int, halo: int | None = None) -> Tensor:
    """The latents that are `rank`'s, [B, F / ranks, C, h, w], of video [B, 3, T, H, W] in [-1, 1].

    Args:
        halo: latents to encode before them; None: `halo_needed`.
    """
    stride = vae.config.stride[0]
    latents = 1 + (video.shape[2] - 1) // stride
    start, stop = share(latents, ranks, rank)
    window = window_of(start, stop, halo_needed(vae.config) if halo is None else halo, stride)
    return encode_window(vae, video[:, :, window.start : window.stop], window)


def encode_together(vae: CausalVAE, video: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All latents of `video`, [B, F, C, h, w], each rank of `group` having encoded its share with its halo.

    A clip too short to be worth cutting, or that can't be cut evenly, is encoded whole by every rank.
    """
    latents = 1 + (video.shape[2] - 1) // vae.config.stride[0]
    ranks = 1 if group is None else dist.get_world_size(group)
    if group is None or latents % ranks:
        with torch.no_grad():
            return vae.encode(video)
    own = encode_share(vae, video, ranks, dist.get_rank(group)).contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts, 1)
