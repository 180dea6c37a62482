"""`longtake doctor`: what this machine has, what runs on it, what is missing and how to get it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from longtake.commands.doctor_report import Diagnosis, examine
from longtake.formats.recipe import recipe_for
from longtake.machine.machine import machine_here


def register(subparsers: Any) -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser("doctor", help="what runs on this machine, and what is missing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--pick", action="store_true", help="print only the name of the recipe that fits this machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 0 if at least the reference backend works."""
    if args.pick:
        print(recipe_for(machine_here().compute_capability))
        return 0
    diagnosis = examine()
    print(json.dumps(diagnosis.as_json(), indent=2) if args.json else "\n".join(report(diagnosis)))
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
