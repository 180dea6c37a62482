"""This machine as the capability table sees it, from cheap look-ups: nothing heavy is imported or run."""

from __future__ import annotations

from longtake.errors import UnavailableError
from longtake.machine.capability import Machine, has_module
from longtake.machine.flavour import Installed, choose, gpu_compute_capability, installed_flavours


def flavour_to_judge(capability: str | None, installed: list[Installed]) -> tuple[str | None, str]:
    """(name, version) of the chosen flavour, or of one that is whole but unfit, for the table to say why."""
    try:
        chosen = choose(capability, installed)
    except UnavailableError:
        whole = [flavour for flavour in installed if flavour.complete]
        return (whole[0].name, whole[0].version) if whole else (None, "")
    return chosen.name, chosen.version


def machine_here() -> Machine:
    """GPU 0, the TensorRT flavour, and whether ONNX Runtime and NVRTC are installed."""
    capability = gpu_compute_capability()
    name, version = flavour_to_judge(capability, installed_flavours())
    return Machine(capability, name, version, has_module("onnxruntime"), has_module("cuda.bindings.nvrtc"))
