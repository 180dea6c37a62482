"""What this machine has, which recipes run on it by which backend, what is missing, and the command that helps."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longtake.commands.probes import (
    Finding,
    attempt,
    disk_finding,
    flavour_finding,
    gpu_findings,
    nvrtc_compiles,
    onnxruntime_works,
    package,
    pyav_works,
    torch_finding,
    trtexec_finding,
)
from longtake.formats.recipe import Recipe, recipe_named, recipe_names
from longtake.machine.capability import FLAVOUR_FIX, NVRTC_FIX, Machine, Verdict, lookup, verdict_for
from longtake.machine.machine import machine_here

REFERENCE_NEEDS = ("PyTorch", "ONNX Runtime", "onnx", "safetensors", "PyAV")


@dataclass(frozen=True)
class RecipeFinding:
    """What happens with one recipe here. native: status of its own plans; builds: whether they can be built here."""

    recipe: str
    backend: str
    native: str
    builds: bool
    reason: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything `longtake doctor` knows."""

    machine: Machine
    findings: list[Finding]
    recipes: list[RecipeFinding]
    reference_works: bool
    missing: list[Finding]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Diagnosis:
    """Look at this machine. Never raises for something that is missing: that is what it reports."""
    findings = [
        Finding("Python", platform.python_version()),
        *gpu_findings(),
        torch_finding(),
        flavour_finding(),
        attempt("ONNX Runtime", "the reference backend", "pip install onnxruntime", onnxruntime_works),
        package("onnx", "export", "pip install onnx"),
        package("nvidia-modelopt", "NVFP4 training and export", "pip install nvidia-modelopt==0.47.0"),
        package("polygraphy", "longtake check", "pip install polygraphy"),
        package("safetensors", "checkpoints", "pip install safetensors"),
        attempt("NVRTC", "compiling the plugin kernels", NVRTC_FIX, nvrtc_compiles),
        attempt("PyAV", "reading and writing mp4", "pip install av", pyav_works),
        trtexec_finding(),
        disk_finding(Path.cwd()),
    ]
    machine = machine_from(findings)
    works = all(finding.ok for finding in findings if finding.name in REFERENCE_NEEDS)
    return Diagnosis(
        machine,
        findings,
        [recipe_finding(machine, recipe_named(name)) for name in recipe_names()],
        works,
        [finding for finding in findings if not finding.ok],
    )


def machine_from(findings: list[Finding]) -> Machine:
    """The capability table's view of this machine, with what the probes found out."""
    usable = {finding.name: finding.ok for finding in findings}
    return replace(machine_here(), onnxruntime=usable["ONNX Runtime"], nvrtc=usable["NVRTC"])


def recipe_finding(machine: Machine, recipe: Recipe) -> RecipeFinding:
    """Which backend runs `recipe` here, and what becomes of its own plans."""
    here, table = verdict_for(machine, recipe, recipe.mode), _table_verdict(machine, recipe)
    backend = recipe.mode if here.usable else "reference" if machine.onnxruntime else "none"
    native = table.status if here.usable or not table.usable else "build, don't run"
    said = here if table.usable else table
    return RecipeFinding(recipe.name, backend, f"{recipe.mode}: {native}", table.usable, said.reason, said.fix)


def _table_verdict(machine: Machine, recipe: Recipe) -> Verdict:
    if machine.flavour is None:
        return Verdict("no", "no TensorRT flavour is installed", FLAVOUR_FIX)
    return lookup(recipe.mode, machine.flavour, machine.flavour_version, recipe.compute_capability, recipe.precision)
