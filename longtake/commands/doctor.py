"""`longtake doctor`: what this machine has, what runs on it, what is missing and how to get it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from longtake.commands.doctor_report import Diagnosis, examine
from longtake.formats.recipe import recipe_for
from longtake.machine.machine import machine_here
from longtake.options import Command, option


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
    print(json.dumps(diagnosis.as_json(), indent=2) if options.json else "\n".join(report(diagnosis)))
    return 0 if diagnosis.reference_works else 3


def report(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis as lines."""
    text = [f"{finding.name:16} {'' if finding.ok else '! '}{finding.found}" for finding in diagnosis.findings]
    text += ["", f"{'recipe':20} {'runs here by':13} {'its own plans':28} why"]
    for item in diagnosis.recipes:
        text.append(f"{item.recipe:20} {item.backend:13} {item.native:28} {item.reason}")
    text += ["", *_missing(diagnosis)]
    return text


def _missing(diagnosis: Diagnosis) -> list[str]:
    if not diagnosis.missing:
        works = "the reference backend works" if diagnosis.reference_works else "the reference backend does not work"
        return [f"nothing is missing; {works}"]
    return ["missing:", *(f"  {item.name} ({item.needed_for}): {item.fix}" for item in diagnosis.missing)]


COMMAND = Command(
    run, (DoctorOptions,), "What this machine has, which recipes run on it and how, what is missing and how to get it."
)
