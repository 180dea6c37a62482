"""Structural similarity of video frames (Wang et al., 2004): Gaussian window of sigma 1.5, 11 x 11, on RGB."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from longtake.errors import LongtakeError

SIGMA, RADIUS = 1.5, 5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(one_THW3: np.ndarray, other_THW3: np.ndarray) -> np.ndarray:
    """SSIM of each frame, float64 [T], of two uint8 clips [T, H, W, 3]; 1 is equality.

    Raises:
        LongtakeError: the clips differ in shape.
    """
    if one_THW3.shape != other_THW3.shape:
        raise LongtakeError(
            "clips of different shape cannot be compared", got=one_THW3.shape, expected=other_THW3.shape
        )
    x, y = (torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in (one_THW3, other_THW3))
    return frame_ssim(x, y).numpy()


def frame_ssim(one: Tensor, other: Tensor) -> Tensor:
    """SSIM of each frame, float64 [T], of two clips [T, 3, H, W] whose values go from 0 to 255."""
    x, y = one.double(), other.double()
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blurred(frames: Tensor) -> Tensor:
    """Gaussian mean of every full window, [T, 3, H - 10, W - 10]."""
    line = torch.exp(
        -(torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64, device=frames.device) ** 2) / (2 * SIGMA**2)
    )
    kernel = (line / line.sum()).expand(3, 1, -1)
    return functional.conv2d(functional.conv2d(frames, kernel[:, :, None], groups=3), kernel[..., None], groups=3)
