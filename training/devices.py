"""The device a training command runs on, by name."""

from __future__ import annotations

import torch

from longtake.errors import LongtakeError, UnavailableError


def name_of(device: torch.device) -> str:
    """What a report calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def device_named(name: str) -> torch.device:
    """The torch device; "auto" takes a GPU where there is one.

    Raises:
        UnavailableError: a GPU was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LongtakeError("unknown device", got=name, expected="auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(
            f"device {name} is not there", got=f"{torch.cuda.device_count()} GPUs", fix="--device cpu, or --device auto"
        )
    return device
