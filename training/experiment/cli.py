"""The command `python -m longtake.training.experiment`: run what is not done yet, as far as the time goes, and report."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longtake.runtime.errors import LongtakeError
from longtake.runtime.files import read_json, require_folder, write_json
from longtake.training.experiment.arms import OutOfTime
from longtake.training.experiment.report import write_report
from longtake.training.experiment.settings import Settings, quick
from longtake.training.experiment.units import Bench, Unit, units
from longtake.training.run_options import device_named

RESERVE = 30.0  # seconds kept for the end of a divisible unit (evaluation, checkpoints) and the report

DESCRIPTION = """Train BF16, NVFP4 after training and NVFP4 in training from the same base, distil the best, and measure
them on held-out stories: flow loss, prompt fidelity, identity across cuts by sinks, drift, the FP4 cache alone.
Every unit's result is kept in --out; with --resume the next call goes on after the last one."""


def main(argv: list[str] | None = None) -> int:
    """Run it; exit code 0: complete, 3: the time was over, go on with --resume, 1: an error."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except LongtakeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is done is kept: the same command with --resume goes on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m longtake.training.experiment", description=DESCRIPTION)
    made.add_argument("--out", type=Path, default=Path("runs/experiment"))
    made.add_argument("--budget-seconds", type=float, default=1500.0, help="stop cleanly after so long (default 1500)")
    made.add_argument("--resume", action="store_true", help="go on with what --out holds")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--start", default="shipped", help="random, shipped (default) or a folder of checkpoints")
    made.add_argument("--base-steps", type=int, help="bf16 steps of each seed before the arms part")
    made.add_argument("--branch-steps", type=int, help="steps of each arm after that")
    made.add_argument("--distill-steps", type=int, help="training steps of each student")
    made.add_argument("--device", default="auto")
    made.add_argument("--quick", action="store_true", help="everything at toy size, to see that it runs")
    made.add_argument("--plan", action="store_true", help="print the plan and stop")
    made.add_argument("--docs", type=Path, help="fill the tables of this page, and put pictures beside it")
    return made


def settings_from(args: argparse.Namespace) -> Settings:
    """The size of the experiment from the command line."""
    made = Settings(start=args.start, seeds=args.seeds)
    made = quick(made) if args.quick else made
    given = {name: getattr(args, name) for name in ("base_steps", "branch_steps", "distill_steps")}
    return replace(made, **{name: value for name, value in given.items() if value is not None})


def run(args: argparse.Namespace) -> int:
    """Plan, work, report."""
    begun = time.monotonic()
    settings, device = settings_from(args), device_named(args.device)
    bench = Bench(settings, args.out, device)
    prepare(bench, args.resume)
    left = [unit for unit in units(settings) if unit.name not in bench.results]
    print_plan(left, bench, args.budget_seconds)
    if args.plan:
        return 0
    finished = work(left, bench, begun + args.budget_seconds)
    report = write_report(bench.results, settings, args.out, device, finished, args.docs)
    print(report)
    print(f"{'complete' if finished else 'to be continued: the same command with --resume'}; {args.out}/results.json")
    return 0 if finished else 3


def prepare(bench: Bench, resume: bool) -> None:
    """Check that --out is free, or holds this very experiment, and read its results.

    Raises:
        LongtakeError: it holds another one, or --resume was not given.
    """
    require_folder(bench.out)
    path, described = bench.out / "settings.json", bench.settings.as_json()
    if path.is_file():
        if not resume:
            raise LongtakeError(f"{bench.out} holds an experiment already", fix="--resume, or another --out")
        if (found := read_json(path)) != described:
            other = sorted(key for key in described if found.get(key) != described[key])
            raise LongtakeError(
                f"{bench.out} holds another experiment",
                got=", ".join(f"{key} {found.get(key)}" for key in other),
                expected=", ".join(f"{key} {described[key]}" for key in other),
                fix="the options it was begun with, or another --out",
            )
    else:
        write_json(path, described)
    for file in sorted((bench.out / "units").glob("*.json")):
        bench.results[file.stem] = read_json(file)


def print_plan(left: list[Unit], bench: Bench, budget: float) -> None:
    """What is still to do and how long it may take."""
    total = sum(unit.seconds for unit in left)
    print(f"experiment on {bench.device}, {bench.settings.seeds} seeds, start: {bench.settings.start}, in {bench.out}")
    if bench.settings.start == "shipped":
        print("the shipped model was trained under NVFP4; its bf16 base steps come before the arms part")
    print(f"{len(bench.results)} units are done, {len(left)} are left: about {total / 60:.0f} minutes on an H100")
    print(f"this call stops after {budget:.0f} s at the latest; what is done is kept")


def work(left: list[Unit], bench: Bench, deadline: float) -> bool:
    """Run units until none is left or the time is over; returns whether all are done."""
    skipped = False
    for number, unit in enumerate(left):
        seconds = deadline - time.monotonic()
        needed = 3 * RESERVE if unit.divisible else unit.seconds
        if seconds < needed and number:
            return False
        began = time.monotonic()
        try:
            result: dict[str, Any] = unit.run(bench, max(1.0, seconds - RESERVE))
        except OutOfTime as stop:
            print(f"{unit.name}: {stop}")
            return False
        took = round(time.monotonic() - began, 1)
        bench.results[unit.name] = {**result, "seconds": took}
        if result.get("skipped"):
            skipped = True  # nothing is kept, so that the next call tries again
            print(f"{unit.name}: skipped, {result['skipped']}")
            continue
        write_json(bench.out / "units" / f"{unit.name}.json", bench.results[unit.name])
        print(f"{unit.name}: {took} s", flush=True)
    if torch.cuda.is_available():
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    return not skipped
