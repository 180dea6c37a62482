"""Where attention falls when a subject returns unnamed, and what not knowing its colour costs, along training.

  longtake experiment probe --checkpoints runs/part1 runs/part2 runs/part3 --json runs/probe.json --plot runs/probe.png
  longtake experiment probe --stories 8                       (the shipped model; some minutes on a CPU)

Checkpoints are shown in the order given: the parts of a run are points along its training. The past is the data set's own,
through the runtime's slots, so a model is asked what it can read, not what it makes up. "unread" is flow loss with the
colour left out of the prompt less that with the colour named, in the chunk at the cut, where only the global sink shows it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from longtake.devices import device_named, name_of
from longtake.errors import LongtakeError
from longtake.files import write_json
from longtake.options import Bounds, Command, OneOf, option
from longtake.provenance import command_line
from longtake.training.data.held_out_stories import Cell, memory_stories
from longtake.training.experiment.arms import PRESET, shipped, vae_of
from longtake.training.experiment.classifier import DigitClassifier
from longtake.training.experiment.evaluate import Eyes
from longtake.training.experiment.probe import CONDITIONS, probe
from longtake.training.experiment.probe_tables import draw_probes, probe_tables
from longtake.training.models.load import load_models
from longtake.training.models.quantize import apply_precision
from longtake.training.models.side_file import SideFile


@dataclass(frozen=True)
class ProbeOptions:
    """What"""

    checkpoints: tuple[Path, ...] = option((shipped(),), metavar="FOLDER")
    """models of one run, in the order of their training"""
    stories: Annotated[int, Bounds(1, 4096)] = option(16, metavar="N")
    """held-out stories"""
    distance: Annotated[int, Bounds(1, 1000)] = option(7, metavar="N")
    """chunks until the subject returns"""
    between: Annotated[int, Bounds(1, 7)] = option(1, metavar="N")
    """subjects in these chunks"""
    precision: Annotated[str, OneOf(("bf16", "nvfp4"))] = option("bf16")
    """of the linears"""
    cache: Annotated[str, OneOf(("nvfp4", "bf16"))] = option("nvfp4")
    """of keys and values"""
    device: str = option("auto")
    """auto, cpu, cuda or cuda:N"""
    json: Path | None = option(None, metavar="FILE")
    """write the figures there as well (default: they are printed only)"""
    plot: Path | None = option(None, metavar="FILE")
    """a picture of attention by layer, and of what is not read (default: none)"""


def steps_of(folder: Path) -> int | None:
    """Steps of all parts that a checkpoint was made in."""
    side = SideFile.read(folder / "dit.json")
    parts = side.facts.get("parts")
    return side.step if not parts else sum(part["steps"] or 0 for part in parts)


def _require_cell_and_names(options: ProbeOptions) -> None:
    if options.between > options.distance:
        what, got = "a chunk shows one subject", f"--between {options.between} in --distance {options.distance}"
        expected, fix = f"1 to {options.distance} subjects", f"--between {options.distance}"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    names = [folder.name for folder in options.checkpoints]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        what, got = "two checkpoints of one name: their figures could not be told apart", ", ".join(twice)
        expected, fix = "folders with names of their own", "rename one, or run the command once for each"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)


def run(options: ProbeOptions) -> int:
    """Measure, print the tables, write them."""
    _require_cell_and_names(options)
    device = device_named(options.device)
    cell = Cell(options.distance, options.between)
    stories = memory_stories(cell, options.stories)
    found: dict[str, Any] = {}
    for folder in options.checkpoints:
        models = apply_precision(load_models(PRESET, folder), options.precision)
        for module in (models.dit, models.text, models.vae):
            module.to(device).requires_grad_(False)
        eyes = Eyes(DigitClassifier(), vae_of(folder, device), device)
        name = folder.name
        found[name] = {**probe(models, eyes, stories, options.cache), "steps": steps_of(folder)}
        head = f"{name}, {found[name]['steps']} steps; {name_of(device)}; {options.stories} stories, {cell}\n\n"
        sys.stdout.write(head + probe_tables({name: found[name]}) + "\n\n")
        sys.stdout.flush()
    if options.json:
        conditions = {
            "command": command_line(),
            "device": name_of(device),
            "cell": list(cell),
            "sinks": list(CONDITIONS),
        }
        write_json(options.json, {"kind": "probe", **conditions, "checkpoints": found})
    if options.plot:
        draw_probes(found, options.plot)
    return 0


COMMAND = Command(run=run, options=(ProbeOptions,), description=__doc__ or "")
