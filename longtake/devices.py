"""The device that a command or a program names."""

from __future__ import annotations

import torch

from longtake.errors import LongtakeError, UnavailableError


def name_of(device: torch.device) -> str:
    """What a report calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def torch_device(
    name: torch.device | str, option: str = "device (--device)", expected: str = "cuda:N or cpu"
) -> torch.device:
    """The torch device of that name, whether it is there or not. Raises LongtakeError for a name that is none's."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise LongtakeError("unknown device", got=name, expected=expected, fix=f"leave out {option}") from None


def device_named(name: torch.device | str) -> torch.device:
    """The torch device; "auto" takes a GPU where there is one.

    Raises:
        UnavailableError: a GPU was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch_device(name, expected="auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        what, got, fix = f"device {name} is not there", f"{torch.cuda.device_count()} GPUs", "pass cpu, or auto"
        raise UnavailableError(what, got=got, expected="one of this machine", fix=fix)
    return device
