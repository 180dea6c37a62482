"""The command `python -m longtake.training.experiment`: run what is not done yet, as far as the time goes, and report."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from longtake.errors import LongtakeError
from longtake.files import read_json, require_folder, write_json
from longtake.training.devices import device_named
from longtake.training.experiment.pack import bring, restore
from longtake.training.experiment.report import write_report
from longtake.training.experiment.scheduler import Scheduler, slots_for
from longtake.training.experiment.settings import Settings, quick
from longtake.training.experiment.units import units

DESCRIPTION = """Train BF16, NVFP4 after training and NVFP4 in training from the same base, distil, and measure them on
held-out stories: flow loss, prompt fidelity, identity across cuts by sinks, drift, the FP4 cache alone. The work is done
by processes, several on each device. Every unit's result is kept in --out; with --resume the next call goes on after the
last one. What is there is reported when the time is over, on Ctrl-C, and at the end."""


def main(argv: list[str] | None = None) -> int:
    """Run it; exit code 0: complete, 3: the time was over, go on with --resume, 1: an error, or units that failed."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except LongtakeError as error:
        print(error, file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m longtake.training.experiment", description=DESCRIPTION)
    made.add_argument("--out", type=Path, default=Path("runs/experiment"))
    made.add_argument("--budget-seconds", type=float, default=1500.0, help="stop cleanly after so long (default 1500)")
    made.add_argument("--resume", action="store_true", help="go on with what --out holds")
    made.add_argument(
        "--devices", "--device", default="auto", help="cuda:0,cuda:1 or cpu (default auto: all GPUs, or the CPU)"
    )
    made.add_argument(
        "--jobs-per-device", type=int, help="processes a device, of which one trains (default 3 on a GPU, else 1)"
    )
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--start", default="shipped", help="random, shipped (default) or a folder of checkpoints")
    made.add_argument("--teacher", default="first", choices=("first", "best"), help="the seed that is distilled")
    made.add_argument("--base-steps", type=int, help="bf16 steps before the arms part, which they have in common")
    made.add_argument("--branch-steps", type=int, help="steps of each arm after that")
    made.add_argument("--distill-steps", type=int, help="training steps of each student, at most")
    made.add_argument("--distill-seconds", type=float, help="seconds of each student's training, at most")
    made.add_argument("--quick", action="store_true", help="everything at toy size, to see that it runs")
    made.add_argument("--plan", action="store_true", help="print the plan and stop")
    made.add_argument("--docs", type=Path, help="fill the tables of this page, and put pictures beside it")
    made.add_argument("--bring", type=Path, metavar="FOLDER",
                      help="at the end, pack the report and what --resume needs elsewhere into a few files there")  # fmt: skip
    made.add_argument("--bring-mb", type=float, default=55.0, help="of which all together are no larger (default 55)")
    made.add_argument("--restore", type=Path, metavar="FOLDER", help="begin with what --bring packed into this folder")
    return made


def settings_from(args: argparse.Namespace) -> Settings:
    """The size of the experiment from the command line."""
    made = Settings(start=args.start, seeds=args.seeds, teacher=args.teacher)
    made = replace(quick(made), seeds=args.seeds if args.seeds < 3 else 1) if args.quick else made
    names = ("base_steps", "branch_steps", "distill_steps", "distill_seconds")
    given = {name: getattr(args, name) for name in names}
    return replace(made, **{name: value for name, value in given.items() if value is not None})


def devices_from(args: argparse.Namespace) -> tuple[list[str], int]:
    """Devices and processes a device.

    Raises:
        LongtakeError: one isn't there.
    """
    names = args.devices.split(",")
    if args.devices == "auto":
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    for name in names:
        device_named(name)
    jobs = (3 if names[0].startswith("cuda") else 1) if args.jobs_per_device is None else args.jobs_per_device
    if jobs < 1:
        raise LongtakeError("no processes", got=jobs, expected="1 or more", fix="--jobs-per-device 2")
    return names, jobs


def run(args: argparse.Namespace) -> int:
    """Plan, work, report."""
    begun = time.monotonic()
    settings, (devices, jobs) = settings_from(args), devices_from(args)
    if args.restore:
        restore(args.restore, args.out)
    prepare(settings, args.out, args.resume or bool(args.restore))
    every = list(units(settings))
    slots = slots_for(args.out.absolute(), devices, jobs)
    scheduler = Scheduler(every, args.out, slots, begun + args.budget_seconds, toy=settings.quick)
    scheduler.say = lambda line: print(line, flush=True)
    if settings.quick:
        scheduler.reserve = 5.0
    print_plan(scheduler, settings, devices, jobs, args)
    if args.plan:
        return 0
    stopped = guarded(scheduler)
    done = not scheduler.left
    missing = scheduler.missing()
    machine = f"{len(devices)} x {device_name(devices[0])}" if len(devices) > 1 else device_name(devices[0])
    machine, seconds = spent(args.out, machine, time.monotonic() - begun, scheduler.ran)
    print(write_report(scheduler.results, settings, args.out, machine, missing, args.docs, seconds))
    if args.bring:
        made, left = bring(args.out, args.bring, every, scheduler.results, args.bring_mb)
        size = sum(path.stat().st_size for path in made) / 1e6
        print(f"packed {len(made)} files, {size:.1f} MB, into {args.bring}" + (f"; left out: {', '.join(left)}" if left else ""))  # fmt: skip
    print(f"{'complete' if done else 'to be continued: the same command with --resume'}; {args.out}/results.json")
    if stopped:
        return 130
    return 0 if done else 1 if scheduler.failures else 3


def guarded(scheduler: Scheduler) -> bool:
    """Run; Ctrl-C and a polite kill end it early. Returns whether one did."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        scheduler.run()
        return False
    except KeyboardInterrupt:
        print("stopped; what is done is kept: the same command with --resume goes on", file=sys.stderr)
        return True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else "CPU"


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
    scheduler: Scheduler, settings: Settings, devices: list[str], jobs: int, args: argparse.Namespace
) -> None:
    """What is still to do and how long it may take."""
    left, total = scheduler.left, sum(unit.seconds for unit in scheduler.left.values())
    heavy = sum(unit.seconds for unit in left.values() if unit.heavy) / len(devices)
    least = max(heavy, total / (len(devices) * jobs))
    print(f"experiment on {', '.join(devices)}, {jobs} processes each, {settings.seeds} seeds, start: {settings.start}, in {args.out}")  # fmt: skip
    if settings.start == "shipped":
        print("the shipped model was trained under NVFP4; its bf16 base steps come before the arms part")
    print(f"{len(scheduler.every) - len(left)} units are done, {len(left)} are left: {total / 60:.0f} minutes one after the other, "
          f"about {1.5 * least / 60:.0f} here if these were H100s")  # fmt: skip
    print(f"this call stops after {args.budget_seconds:.0f} s at the latest; what is done is kept", flush=True)
