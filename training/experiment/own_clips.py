"""Whether a model makes of a caption the clip that it stands for: the nearest training clip of a video's first frame.

Nearest is the highest PSNR with any of a clip's frames, all brought to 32 x 32. An untuned model scores chance.

Legend: N captions, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from longtake.files import atomic_path
from longtake.training.data.clips import Clip, ClipReader
from longtake.training.experiment.batched import Rollout, Sampling, Script, decode
from longtake.training.models.load import Models

SIDE = 32
LOOKED_AT = 64  # frames of a clip, at most
BATCH = 8


@dataclass(frozen=True)
class Nearest:
    """Of each caption: the clip it stands for, the nearest clip, and how near that is in dB."""

    captions: list[str]
    nearest: list[str]
    psnr: list[float]

    @property
    def right(self) -> int:
        """How many captions have their own clip nearest."""
        return sum(own == found for own, found in zip(self.captions, self.nearest))


def thumbnails(reader: ClipReader, clip: Clip) -> Tensor:
    """Frames of a clip, evenly spread, fp32 [T, 3, SIDE, SIDE] in [0, 1]."""
    places = np.unique(np.linspace(0, clip.frames - 1, min(LOOKED_AT, clip.frames)).round().astype(int))
    frames = np.concatenate([reader.read(clip, int(place), 1) for place in places])
    return small(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)


def small(frames: Tensor) -> Tensor:
    """Frames [T, 3, H, W] brought to SIDE x SIDE."""
    return functional.adaptive_avg_pool2d(frames, SIDE)


@torch.no_grad()
def videos_of(models: Models, captions: Sequence[str], sampling: Sampling, seed: int, device: torch.device) -> Tensor:
    """The first chunk that a model makes of each caption, fp32 [N, 3, T, H, W] in [0, 1]."""
    parts = []
    for start in tqdm(range(0, len(captions), BATCH), desc="generate", unit="batch", disable=None):
        part = captions[start : start + BATCH]
        scripts = [Script((caption,), (False,), seed * 100_003 + start + i) for i, caption in enumerate(part)]
        latents = next(iter(Rollout(models, scripts, sampling, device)))
        parts += [decode(models.vae, row[None], None)[0].cpu() for row in latents]
    return (torch.cat(parts) * 0.5 + 0.5).clamp(0, 1)


def nearest_clips(videos: Tensor, captions: Sequence[str], clips: Sequence[Clip], reader: ClipReader) -> Nearest:
    """The nearest clip, by its caption, of the first frame of each video [N, 3, T, H, W]."""
    first = small(videos[:, :, 0])
    table = []
    for clip in clips:
        shown = thumbnails(reader, clip)
        error = (first[:, None] - shown[None]).square().mean((2, 3, 4)).amin(1)
        table.append(-10 * error.clamp_min(1e-10).log10())
    best = torch.stack(table, 1).max(1)
    return Nearest(list(captions), [clips[i].caption for i in best.indices.tolist()], best.values.tolist())


def sheet(videos: Tensor, found: Nearest, clips: Sequence[Clip], reader: ClipReader, path: Path) -> None:
    """A picture: the clip of each caption on the left, then frames of what was made of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_caption = {clip.caption: clip for clip in clips}
    figure, axes = pyplot.subplots(len(videos), 1, figsize=(10, 1.4 * len(videos)), squeeze=False)
    for axis, video, caption, nearest in zip(axes[:, 0], videos, found.captions, found.nearest):
        own = reader.read(by_caption[caption], 0, 1)[0]
        chosen = np.linspace(0, video.shape[1] - 1, 6).round().astype(int)
        made = [(video[:, i].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for i in chosen]
        axis.imshow(np.concatenate([own, *made], axis=1))
        axis.set_axis_off()
        axis.set_title(f"{caption}" + ("" if caption == nearest else f"  (nearest: {nearest})"), fontsize=7, loc="left")
    figure.tight_layout(pad=0.3)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=90)
    pyplot.close(figure)
