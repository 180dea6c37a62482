"""`longtake doctor`: what this machine has, what runs on it, what is missing and how to get it."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, replace

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
    serve_finding,
    torch_finding,
    trtexec_finding,
)
from longtake.formats.recipe import Recipe, recipe_for, recipe_named, recipe_names
from longtake.machine.capability import FLAVOUR_FIX, NVRTC_FIX, Machine, Verdict, lookup, verdict_for
from longtake.machine.machine import machine_here
from longtake.options import Command, option
from longtake.settings import settings_from_environment

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
    """Everything `longtake doctor` knows, JSON-ready by `asdict`."""

    machine: Machine
    findings: list[Finding]
    recipes: list[RecipeFinding]
    reference_works: bool
    missing: list[Finding]


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
        package("polygraphy", "reading exported files without longtake", "pip install polygraphy"),
        package("safetensors", "checkpoints", "pip install safetensors"),
        attempt("NVRTC", "compiling the plugin kernels", NVRTC_FIX, nvrtc_compiles),
        attempt("PyAV", "reading and writing mp4", "pip install av", pyav_works),
        serve_finding(),
        trtexec_finding(),
        disk_finding(settings_from_environment().home),
    ]
    usable = {finding.name: finding.ok for finding in findings}
    machine = replace(machine_here(), onnxruntime=usable["ONNX Runtime"], nvrtc=usable["NVRTC"])
    works = all(finding.ok for finding in findings if finding.name in REFERENCE_NEEDS)
    return Diagnosis(
        machine,
        findings,
        [recipe_finding(machine, recipe_named(name)) for name in recipe_names()],
        works,
        [finding for finding in findings if not finding.ok],
    )


def recipe_finding(machine: Machine, recipe: Recipe) -> RecipeFinding:
    """Which backend runs `recipe` here, and what becomes of its own plans."""
    here, mode = verdict_for(machine, recipe, recipe.mode), recipe.mode
    table = Verdict("no", "no TensorRT flavour is installed", FLAVOUR_FIX)
    if machine.flavour is not None:
        table = lookup(mode, machine.flavour, machine.flavour_version, recipe.compute_capability, recipe.precision)
    backend = mode if here.usable else "reference" if machine.onnxruntime else "none"
    native = table.status if here.usable or not table.usable else "build, don't run"
    said = here if table.usable else table
    return RecipeFinding(recipe.name, backend, f"{mode}: {native}", table.usable, said.reason, said.fix)


@dataclass(frozen=True)
class DoctorOptions:
    """What is printed"""

    json: bool = option(False)
    """JSON instead of text"""
    pick: bool = option(False)
    """only the name of the recipe that fits this machine"""


def run(options: DoctorOptions) -> int:
    """Print the diagnosis; 0 if at least the reference backend works."""
    if options.pick:
        print(recipe_for(machine_here().compute_capability))
        return 0
    diagnosis = examine()
    print(json.dumps(asdict(diagnosis), indent=2) if options.json else "\n".join(report(diagnosis)))
    return 0 if diagnosis.reference_works else 3


def report(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis as lines."""
    text = [f"{finding.name:16} {'' if finding.ok else '! '}{finding.found}" for finding in diagnosis.findings]
    wide = max(len(item.recipe) for item in diagnosis.recipes)
    text += ["", f"{'recipe':{wide}} {'runs here by':13} {'its own plans':28} why"]
    for item in diagnosis.recipes:
        text.append(f"{item.recipe:{wide}} {item.backend:13} {item.native:28} {item.reason}")
    if diagnosis.missing:
        missing = (f"  {item.name} ({item.needed_for}): {item.fix}" for item in diagnosis.missing)
        return [*text, "", "missing:", *missing]
    works = "the reference backend works" if diagnosis.reference_works else "the reference backend does not work"
    return [*text, "", f"nothing is missing; {works}"]


COMMAND = Command(
    run, (DoctorOptions,), "What this machine has, which recipes run on it and how, what is missing and how to get it."
)
