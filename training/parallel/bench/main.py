"""Balanced against naive sequence parallelism and none, from one run: `python -m longtake.training.parallel.bench.main`.

  torchrun --nproc-per-node 2 -m longtake.training.parallel.bench.main --layers 8 --seconds 16 32 --out bench.json
  python -m longtake.training.parallel.bench.main --nproc 2 --preset tiny --device cpu --layers 1 --seconds 2 --iterations 1

The cases run one after another in the same processes, which are started anew after one that ran out of memory: that is a
result, not the end. The report is written after each case, and all ends in the time that --budget-seconds gives.
With --mode none every rank has a sample of its own: an iteration is then as many samples as ranks, and "s_per_sample"
is what to compare throughput by. Under the others all ranks share one sample.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from longtake.errors import LongtakeError
from longtake.files import write_json
from longtake.provenance import commit, cpu_name, versions
from longtake.training.models.presets import PRESETS, Preset, preset_named
from longtake.training.parallel.bench.runs import Plan, Runs
from longtake.training.parallel.bench.table import ratios, table
from longtake.training.parallel.bench.worker import Case, Models, measure, sized
from longtake.training.parallel.layout import MODES, NONE
from longtake.training.parallel.ranks import join_ranks, started_by_torchrun
from longtake.training.parallel.sharding import require_heads

logger = logging.getLogger(__name__)

WAYS = (*MODES, NONE)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m longtake.training.parallel.bench.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--preset", default="wan2.2-ti2v-5b", choices=sorted(PRESETS))
    p.add_argument(
        "--layers", type=int, default=8, help="depth of the transformer (default 8); widths are the preset's"
    )
    p.add_argument("--height", type=int, help="pixels (default: the preset's)")
    p.add_argument("--width", type=int)
    p.add_argument("--seconds", type=float, nargs="+", default=[16, 32], help="lengths of the clip (default 16 32)")
    p.add_argument("--modes", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--iterations", type=int, default=3, help="timed, where time allows (default 3); one at least")
    p.add_argument("--warmup", type=int, default=1, help="0 for none; the first has all shapes and "
                   "as much memory, but little work")  # fmt: skip
    p.add_argument("--no-vae", action="store_true", help="latents are there already")
    p.add_argument("--halo", default="even", choices=("even", "equal"), help="balanced: latents that each rank encodes "
                   "(even, default) or keeps (equal, as in the reference) are as many on every rank")  # fmt: skip
    p.add_argument("--attention", default="blocks", choices=("blocks", "flex"))
    p.add_argument("--fp32", action="store_true")
    p.add_argument("--longest", type=float, metavar="S", help="after that, in steps of 8 s and up to S seconds, the "
                   "longest clip that each mode fits: iterations with a real one's memory and little work")  # fmt: skip
    p.add_argument("--budget-seconds", type=float, default=240, metavar="S", help="time for everything (default 240); "
                   "what isn't measured by then is left out")  # fmt: skip
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    p.add_argument("--nproc", type=int, help="ranks, where torchrun didn't start this")
    p.add_argument("--out", type=Path, help="write the report there, too")
    p.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--rehearse-oom", default="", metavar="MODE", help=argparse.SUPPRESS)  # its last rank fails
    return p


def main(arguments: list[str] | None = None) -> int:
    """Measure everything asked for; under torchrun, rank 0 does and the others have nothing to do."""
    words = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.record:
            worker(args)
            return 0
        if started_by_torchrun() and os.environ["RANK"] != "0":
            return 0
        ranks = args.nproc or int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
        result = bench(args, ranks, "python -m longtake.training.parallel.bench.main " + shlex.join(words))
    except LongtakeError as error:
        sys.stderr.write(f"bench: error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result, indent=2) + "\n\n" + table(result) + "\n")
    return 0


def worker(args: argparse.Namespace) -> None:
    """All cases on one rank; results go to files of the folder --record.

    A rank that fails is gone at once: leaving the process group would wait for ranks that wait for this one.
    """
    preset = preset_of(args)
    cases = [Case(**case) for case in json.loads((args.record / "cases.json").read_text())]
    try:
        with join_ranks(args.device, int(os.environ["WORLD_SIZE"])) as ranks:
            models = Models(preset, ranks, bf16=not args.fp32, vae=not args.no_vae)
            for number, case in enumerate(cases):
                started = time.monotonic()
                found = measure(models, case, ranks)
                write_json(args.record / f"{number}-{ranks.rank}.json", {**found, "took_s": time.monotonic() - started})
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def preset_of(args: argparse.Namespace) -> Preset:
    return sized(preset_named(args.preset), args.layers, args.height, args.width)


def bench(args: argparse.Namespace, ranks: int, command: str) -> dict[str, Any]:
    """The report."""
    preset = preset_of(args)
    require_heads(preset, ranks)
    plan = Plan(preset, ranks, args.halo, args.attention, not args.fp32, not args.no_vae, args.rehearse_oom)
    words = ["-m", "longtake.training.parallel.bench.main"]
    for name in ("preset", "layers", "height", "width", "device"):
        words += [f"--{name}", str(getattr(args, name))] if getattr(args, name) is not None else []
    words += [f"--{name.replace('_', '-')}" for name in ("no_vae", "fp32") if getattr(args, name)]
    result: dict[str, Any] = {
        "kind": "bench",
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": preset.name,
        "layers": preset.dit.layers,
        "resolution": f"{preset.width}x{preset.height}",
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "cpu": cpu_name(),
        "versions": versions(),
        "ranks": ranks,
        "precision": "fp32" if args.fp32 else "bf16",
        "halo": args.halo,
        "attention": args.attention,
    }

    def save(cases: list[dict[str, Any]], longest: dict[str, Any]) -> None:
        result.update(cases=cases, ratio=ratios(cases), longest=longest)
        if args.out:
            write_json(args.out, result)

    runs = Runs(plan, words, time.monotonic() + args.budget_seconds, save)
    runs.measure(args.seconds, args.modes, args.iterations, args.warmup)
    if args.longest:
        memory = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else 0
        runs.find_longest(args.modes, args.longest, memory)
    return result


if __name__ == "__main__":
    sys.exit(main())
