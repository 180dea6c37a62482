"""A move of the camera: from the form in which vLLM-Omni's clients send it to the one that a session takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from longtake.runtime.serve.contract import Camera, ServeError

SMALL = 1e-3


def way_of(camera: Camera, fps: float) -> dict[str, Any]:
    """What `Session.steer` is told. Axes are OpenCV's: x right, y down, z forward.

    Raises:
        ServeError: the rotation is none, or the camera would rise or roll on its way.
    """
    (x, y, z), rotation = camera.data.translation, _rotation(camera.data.rotation)
    if camera.mode == "target":
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, (x, y, z)
        return {"target": pose.tolist()}
    if abs(y) > SMALL or abs(rotation[1, 0]) > SMALL:
        detail = {"got": f"{y:g} down, {rotation[1, 0]:.3g} of roll", "fix": "leave both 0, or send a target"}
        raise ServeError("interaction_failed", "this camera walks: it neither rises nor rolls", detail=detail)
    yaw, pitch = math.atan2(rotation[0, 2], rotation[2, 2]), math.asin(max(-1.0, min(1.0, -rotation[1, 2])))
    return {"velocity": [z * fps, x * fps, math.degrees(yaw) * fps, math.degrees(pitch) * fps]}


def _rotation(quaternion: tuple[float, ...]) -> np.ndarray[Any, Any]:
    length = math.sqrt(sum(part * part for part in quaternion))
    if length < SMALL:
        detail = {"got": str(list(quaternion)), "expected": "x, y, z, w", "fix": "pass [0, 0, 0, 1] for none"}
        raise ServeError("bad_request", "this quaternion turns nothing", param="rotation", detail=detail)
    x, y, z, w = (part / length for part in quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
