"""Camera poses as seen from the first of them."""

from __future__ import annotations

import numpy as np


def relative_poses(poses: np.ndarray) -> np.ndarray:
    """Rigid poses [N, 4, 4], float64, as seen from the first, which becomes the identity exactly."""
    rotation, place = poses[0, :3, :3], poses[0, :3, 3]
    back = np.eye(4)
    back[:3, :3], back[:3, 3] = rotation.T, -rotation.T @ place
    moved = back @ poses.astype(np.float64)
    moved[0] = np.eye(4)
    return np.asarray(moved)
