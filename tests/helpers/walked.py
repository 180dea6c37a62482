"""A whole path of a camera at once."""

from __future__ import annotations

import numpy as np

from longtake.training.models.sana_wm.actions import Pace, keys_of_frames, roll_out


def poses_of_action(action: str, pace: Pace | None = None) -> np.ndarray:
    """The poses of an action string, fp32 [N + 1, 4, 4], the first of which is the identity."""
    poses, _ = roll_out(keys_of_frames(action), pace or Pace())
    return np.concatenate((np.eye(4)[None], poses)).astype(np.float32)
