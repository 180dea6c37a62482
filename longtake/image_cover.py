"""Pictures that cover a video's size, what is too much cut off evenly; for models that were trained with such."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Cover:
    """How a picture's pixels became the video's: times scale, less offset; (x, y)."""

    scale: tuple[float, float]
    offset: tuple[int, int]

    def intrinsics(self, given: np.ndarray) -> np.ndarray:
        """Intrinsics [..., 4] (fx, fy, cx, cy) of the picture, of the video."""
        (x, y), (left, top) = self.scale, self.offset
        return given * np.array([x, y, x, y]) - np.array([0, 0, left, top])


def cover_of(shape_hw: tuple[int, int], height: int, width: int) -> tuple[Cover, tuple[int, int]]:
    """How a picture of that shape covers a video, and the size (width, height) that it is resized to first."""
    tall, wide = shape_hw
    scale = max(height / tall, width / wide)
    size = max(width, round(wide * scale)), max(height, round(tall * scale))
    offset = (size[0] - width) // 2, (size[1] - height) // 2
    return Cover((size[0] / wide, size[1] / tall), offset), size


def covering(pixels_HWC: np.ndarray, height: int, width: int) -> tuple[Tensor, Cover]:
    """uint8 [H, W, 3] to fp32 [3, height, width] in [-1, 1]: aspect kept, Lanczos, cut to the middle."""
    from PIL import Image

    cover, size = cover_of(pixels_HWC.shape[:2], height, width)
    left, top = cover.offset
    resized = np.asarray(Image.fromarray(pixels_HWC).resize(size, Image.Resampling.LANCZOS))
    cut = resized[top : top + height, left : left + width]
    return torch.from_numpy(cut.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0), cover
