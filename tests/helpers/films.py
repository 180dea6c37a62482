"""A whole film at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longtake.video import frames_one_by_one, opened, rate_of


def frames_from_video(
    path: Path | str, size_hw: tuple[int, int] | None = None, fps: float | None = None
) -> tuple[np.ndarray, float]:
    """All frames that `frames_one_by_one` gives, uint8 [T, H, W, 3], and their rate."""
    source = Path(path)
    with opened(source) as (_, stream):
        rate = rate_of(source, stream)
    return np.stack(list(frames_one_by_one(source, size_hw, fps))), fps or float(rate)
