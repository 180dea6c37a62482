"""`longtake experiment`: run what is not done yet, as far as the time goes, and report."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from longtake.devices import device_named, name_of
from longtake.errors import LongtakeError
from longtake.files import read_json, require_folder, write_json
from longtake.options import Command, OneOf, option
from longtake.training.experiment.pack import bring, restore
from longtake.training.experiment.report import write_report
from longtake.training.experiment.scheduler import Scheduler, Slot
from longtake.training.experiment.settings import Settings, quick
from longtake.training.experiment.units import units
from longtake.training.options import Chunks, ReturnDistance

DESCRIPTION = """Train BF16, NVFP4 after training and NVFP4 in training from the same base, distil, and measure them on
held-out stories: flow loss, prompt fidelity, identity across cuts by sinks, drift, the FP4 cache alone. The work is done
by processes, several on each device. Every unit's result is kept in --out; with --resume the next call goes on after the
last one. What is there is reported when the time is over, on Ctrl-C, and at the end."""


@dataclass(frozen=True)
class ExperimentOptions:
    """What"""

    out: Path = option(Path("runs/experiment"), metavar="FOLDER")
    """every unit's result is kept there"""
    budget_seconds: float = option(1500.0, metavar="S")
    """stop cleanly after so long"""
    resume: bool = option(False)
    """go on with what --out holds"""
    devices: str = option("auto", names=("--device", "--devices"), metavar="NAMES")
    """cuda:0,cuda:1 or cpu; auto: all GPUs, or the CPU"""
    jobs_per_device: int | None = option(None, metavar="N")
    """processes a device, of which one trains (default: 3 on a GPU, else 1)"""
    seeds: int = option(3, metavar="N")
    """how often everything is trained"""
    start: str = option("shipped", metavar="random|shipped|FOLDER")
    """what the base is trained from; FOLDER: of checkpoints"""
    teacher: Annotated[str, OneOf(("first", "best"))] = option("first")
    """the seed that is distilled"""
    base_steps: int | None = option(None, metavar="N")
    """bf16 steps before the arms part, which they have in common (default: 1800)"""
    branch_steps: int | None = option(None, metavar="N")
    """steps of each arm after that (default: 1000)"""
    chunks: Chunks | None = option(None, metavar="N..M")
    """lengths of training stories (default: 1,5,8,8,8)"""
    return_distance: ReturnDistance | None = option(None, metavar="N..M")
    """of training stories: how many chunks others have before a subject returns (default: as far as 8 chunks let it)"""
    batch: int | None = option(None, metavar="N")
    """stories of the longest length in a step of training; more of shorter ones (default: 20)"""
    stories: int | None = option(None, metavar="N")
    """training stories (default: 4000)"""
    distill_steps: int | None = option(None, metavar="N")
    """training steps of each student, at most (default: 3000)"""
    distill_seconds: float | None = option(None, metavar="S")
    """seconds of each student's training, at most (default: 330)"""
    distill_rollout: Chunks | None = option(None, metavar="N..M")
    """chunks of each student's own video, of which the last 1, 2 or 4 are learnt on (default: only these)"""
    quick: bool = option(False)
    """everything at toy size, to see that it runs"""
    plan: bool = option(False)
    """print the plan and stop"""
    docs: Path | None = option(None, metavar="PAGE")
    """fill the tables of this page, and put pictures beside it (default: none)"""
    bring: Path | None = option(None, metavar="FOLDER")
    """at the end, pack the report and what --resume needs elsewhere into a few files there (default: not)"""
    bring_mb: float = option(55.0, metavar="MB")
    """of which all together are no larger"""
    restore: Path | None = option(None, metavar="FOLDER")
    """begin with what --bring packed into this folder (default: with nothing)"""

    @property
    def settings(self) -> Settings:
        """The size of the experiment."""
        made = Settings(start=self.start, seeds=self.seeds, teacher=self.teacher)
        made = replace(quick(made), seeds=self.seeds if self.seeds < 3 else 1) if self.quick else made
        names = {one.name for one in fields(Settings)} - {"seeds", "quick"}
        return replace(made, **{name: value for name in names if (value := getattr(self, name, None)) is not None})


def run(options: ExperimentOptions) -> int:
    """Run it; exit code 0: complete, 3: the time was over, go on with --resume, 1: an error, or units that failed."""
    try:
        return run_units(options)
    except LongtakeError as error:
        print(error, file=sys.stderr)
        return 1


def devices_from(options: ExperimentOptions) -> tuple[list[str], int]:
    """Devices and processes a device.

    Raises:
        LongtakeError: one isn't there.
    """
    names = options.devices.split(",")
    if options.devices == "auto":
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    for name in names:
        device_named(name)
    jobs = (3 if names[0].startswith("cuda") else 1) if options.jobs_per_device is None else options.jobs_per_device
    if jobs < 1:
        raise LongtakeError("no processes", got=jobs, expected="1 or more", fix="--jobs-per-device 2")
    return names, jobs


def run_units(options: ExperimentOptions) -> int:
    """Plan, work, report."""
    begun = time.monotonic()
    settings, (devices, jobs) = options.settings, devices_from(options)
    if options.restore:
        restore(options.restore, options.out)
    prepare(settings, options.out, options.resume or bool(options.restore))
    scheduler = Scheduler(
        every=list(units(settings)),
        out=options.out,
        slots=[Slot(device, number, jobs > 1) for device in devices for number in range(jobs)],
        deadline=begun + options.budget_seconds,
        reserve=5.0 if settings.quick else 20.0,
        toy=settings.quick,
        say=partial(print, flush=True),
    )
    print_plan(scheduler, settings, devices, jobs, options)
    if options.plan:
        return 0
    stopped = False
    try:
        scheduler.run()
    except KeyboardInterrupt:
        stopped = True
        print("stopped; what is done is kept: the same command with --resume goes on", file=sys.stderr)
    missing = scheduler.missing()
    machine = f"{len(devices)} x " * (len(devices) > 1) + name_of(torch.device(devices[0]))
    machine, seconds = spent(options.out, machine, time.monotonic() - begun, scheduler.ran)
    print(write_report(scheduler.results, settings, options.out, machine, missing, options.docs, seconds))
    if options.bring:
        made, left = bring(options.out, options.bring, scheduler.every, scheduler.results, options.bring_mb)
        size = sum(path.stat().st_size for path in made) / 1e6
        print(
            f"packed {len(made)} files, {size:.1f} MB, into {options.bring}"
            + (f"; left out: {', '.join(left)}" if left else "")
        )
    more = "to be continued: the same command with --resume" if scheduler.left else "complete"
    print(f"{more}; {options.out}/results.json")
    return 130 if stopped else 0 if not scheduler.left else 1 if scheduler.failures else 3


def spent(out: Path, machine: str, seconds: float, ran: bool) -> tuple[str, float]:
    """The machines and the seconds of all calls in which something ran, this one counted in."""
    path = out / "seconds.json"
    known = read_json(path) if path.is_file() else {}
    machines, total = list(known.get("machines", [])), float(known.get("seconds", 0.0))
    if ran:
        machines += [] if machine in machines else [machine]
        total = round(total + seconds, 1)
        write_json(path, {"machines": machines, "seconds": total})
    return " and ".join(machines) or machine, total


def prepare(settings: Settings, out: Path, resume: bool) -> None:
    """Check that --out is free, or holds this very experiment.

    Raises:
        LongtakeError: it holds another one, or --resume was not given.
    """
    require_folder(out)
    path, described = out / "settings.json", json.loads(json.dumps(settings.as_json()))
    if path.is_file():
        if not resume:
            raise LongtakeError(f"{out} holds an experiment already", fix="--resume, or another --out")
        if (found := read_json(path)) != described:
            other = sorted(key for key in described if found.get(key) != described[key])
            raise LongtakeError(
                f"{out} holds another experiment",
                got=", ".join(f"{key} {found.get(key)}" for key in other),
                expected=", ".join(f"{key} {described[key]}" for key in other),
                fix="the options it was begun with, or another --out",
            )
    else:
        write_json(path, described)


def print_plan(
    scheduler: Scheduler, settings: Settings, devices: list[str], jobs: int, options: ExperimentOptions
) -> None:
    """What is still to do and how long it may take."""
    left, total = scheduler.left, sum(unit.seconds for unit in scheduler.left.values())
    heavy = sum(unit.seconds for unit in left.values() if unit.heavy) / len(devices)
    least = max(heavy, total / (len(devices) * jobs))
    print(
        f"experiment on {', '.join(devices)}, {jobs} processes each, {settings.seeds} seeds, start: {settings.start}, in {options.out}"
    )
    if settings.start == "shipped":
        print("the shipped model was trained under NVFP4; its bf16 base steps come before the arms part")
    print(
        f"{len(scheduler.every) - len(left)} units are done, {len(left)} are left: {total / 60:.0f} minutes one after the other, "
        f"about {1.5 * least / 60:.0f} here if these were H100s"
    )
    print(f"this call stops after {options.budget_seconds:.0f} s at the latest; what is done is kept", flush=True)


COMMAND = Command(run=run, options=(ExperimentOptions,), description=DESCRIPTION)
