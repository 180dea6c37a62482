"""A contact sheet: the same stories by every condition, one row each, as a picture and as a video."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.files import atomic_path
from longtake.video import VideoWriter

COLUMNS = 12


def contact_sheet(rows: Mapping[str, Iterable[Tensor]], out: Path, fps: int) -> dict[str, Any]:
    """Write <out>/sheet.png (frames over time) and <out>/sheet.mp4 (conditions side by side) of each row's stories.

    rows: name -> frames of each chunk, fp32 [B, 3, T, H, W] in [-1, 1].
    """
    videos = {name: _video(chunks) for name, chunks in rows.items()}
    _picture(videos, out / "sheet.png")
    writer = VideoWriter(out / "sheet.mp4", fps)
    tall = [np.concatenate(list(video), axis=1) for video in videos.values()]  # [T, B H, W, 3]
    writer.write(np.concatenate(tall, axis=2))
    writer.close()
    return {"rows": list(videos), "picture": "sheet.png", "video": "sheet.mp4"}


def _video(chunks: Iterable[Tensor]) -> np.ndarray:
    """uint8 [B, T, H, W, 3]."""
    frames = torch.cat([chunk.cpu() for chunk in chunks], 2)
    return ((frames * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def _picture(videos: Mapping[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    stories = len(next(iter(videos.values())))
    figure = Figure(figsize=(COLUMNS, 1.15 * len(videos) * stories))
    axes = figure.subplots(len(videos) * stories, 1, squeeze=False)
    for place in range(len(videos) * stories):
        name, story = list(videos)[place % len(videos)], place // len(videos)
        frames = videos[name][story]
        chosen = np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)
        axis = axes[place, 0]
        axis.imshow(np.concatenate(list(frames[chosen]), axis=1))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.3)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=90, bbox_inches="tight")
