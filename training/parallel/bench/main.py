"""Balanced against naive sequence parallelism and none, from one run.

  torchrun --nproc-per-node 2 -m longtake bench parallel --layers 8 --seconds 16 32 --out bench.json
  longtake bench parallel --nproc 2 --preset tiny --device cpu --layers 1 --seconds 2 --iterations 1

The cases run one after another in the same processes, which are started anew after one that ran out of memory: that is a
result, not the end. The report is written after each case, and all ends in the time that --budget-seconds gives.
With --mode none every rank has a sample of its own: an iteration is then as many samples as ranks, and "s_per_sample"
is what to compare throughput by. Under the others all ranks share one sample.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch

from longtake.files import write_json
from longtake.options import Command, OneOf, Text, option
from longtake.provenance import commit, cpu_name, versions
from longtake.training.models.preset_files import preset_named
from longtake.training.models.presets import WAN22_TI2V_5B, Preset
from longtake.training.parallel.bench.runs import Plan, Runs
from longtake.training.parallel.bench.table import ratios, table
from longtake.training.parallel.bench.worker import Case, Models, measure, sized
from longtake.training.parallel.layout import MODES, NONE
from longtake.training.parallel.ranks import join_ranks, started_by_torchrun
from longtake.training.parallel.sharding import require_heads

logger = logging.getLogger(__name__)

WAYS = (*MODES, NONE)


@dataclass(frozen=True)
class ParallelBenchOptions:
    """What"""

    preset: Annotated[Preset, Text(preset_named, lambda preset: preset.name)] = option(WAN22_TI2V_5B, metavar="NAME")
    """sizes of the networks, by name"""
    layers: int = option(8, metavar="N")
    """depth of the transformer; widths are the preset's"""
    height: int | None = option(None, metavar="PIXELS")
    """of the clip (default: the preset's)"""
    width: int | None = option(None, metavar="PIXELS")
    """of the clip (default: the preset's)"""
    seconds: tuple[float, ...] = option((16.0, 32.0), metavar="S")
    """lengths of the clip"""
    modes: Annotated[tuple[str, ...], OneOf(WAYS)] = option(WAYS)
    """ways of sharing a sample, or none"""
    iterations: int = option(3, metavar="N")
    """timed, where time allows; one at least"""
    warmup: int = option(1, metavar="N")
    """0 for none; the first has all shapes and as much memory, but little work"""
    vae: bool = option(True)
    """latents are there already"""
    halo: Annotated[str, OneOf(("even", "equal"))] = option("even")
    """balanced: latents that each rank encodes (even) or keeps (equal, as in the reference) are as many on every rank"""
    attention: Annotated[str, OneOf(("blocks", "flex"))] = option("blocks")
    """block by block, or FlexAttention"""
    fp32: bool = option(False)
    """compute in fp32"""
    longest: float | None = option(None, metavar="S")
    """after that, in steps of 8 s and up to S seconds, the longest clip that each mode fits: iterations with a real one's
    memory and little work (default: not sought)"""
    budget_seconds: float = option(240.0, metavar="S")
    """time for everything; what isn't measured by then is left out"""
    device: Annotated[str, OneOf(("cuda", "cpu"))] | None = option(None)
    """where (default: cuda if there is a GPU)"""
    nproc: int | None = option(None, metavar="N")
    """ranks, where torchrun didn't start this (default: as many as GPUs)"""
    out: Path | None = option(None, metavar="FILE")
    """write the report there, too (default: it is printed only)"""
    record: Path | None = option(None, hidden=True)
    """a worker's folder"""
    rehearse_oom: str = option("", hidden=True)
    """the last rank of this mode fails"""

    @property
    def on(self) -> str:
        """The kind of device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def sized(self) -> Preset:
        """The preset, cut to size."""
        return sized(self.preset, self.layers, self.height, self.width)


def run(options: ParallelBenchOptions) -> int:
    """Measure everything asked for; under torchrun, rank 0 does and the others have nothing to do."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    if options.record:
        worker(options, options.record)
        return 0
    if started_by_torchrun() and os.environ["RANK"] != "0":
        return 0
    ranks = options.nproc or int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    result = bench(options, ranks, shlex.join(["longtake", *sys.argv[1:]]))
    sys.stdout.write(json.dumps(result, indent=2) + "\n\n" + table(result) + "\n")
    return 0


def worker(options: ParallelBenchOptions, record: Path) -> None:
    """All cases on one rank; results go to files of the folder --record.

    A rank that fails is gone at once: leaving the process group would wait for ranks that wait for this one.
    """
    cases = [Case(**case) for case in json.loads((record / "cases.json").read_text())]
    try:
        with join_ranks(options.on, int(os.environ["WORLD_SIZE"])) as ranks:
            models = Models(options.sized, ranks, bf16=not options.fp32, vae=options.vae)
            for number, case in enumerate(cases):
                started = time.monotonic()
                found = measure(models, case, ranks)
                write_json(record / f"{number}-{ranks.rank}.json", {**found, "took_s": time.monotonic() - started})
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def bench(options: ParallelBenchOptions, ranks: int, command: str) -> dict[str, Any]:
    """The report."""
    preset = options.sized
    require_heads(preset, ranks)
    plan = Plan(preset, ranks, options.halo, options.attention, not options.fp32, options.vae, options.rehearse_oom)
    words = ["-m", "longtake", "bench", "parallel", "--preset", options.preset.name, "--device", options.on]
    for name in ("layers", "height", "width"):
        words += [f"--{name}", str(getattr(options, name))] if getattr(options, name) is not None else []
    words += [*([] if options.vae else ["--no-vae"]), *(["--fp32"] if options.fp32 else [])]
    result: dict[str, Any] = {
        "kind": "bench",
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": preset.name,
        "layers": preset.dit.layers,
        "resolution": f"{preset.width}x{preset.height}",
        "gpu": torch.cuda.get_device_name() if options.on == "cuda" else None,
        "cpu": cpu_name(),
        "versions": versions(),
        "ranks": ranks,
        "precision": "fp32" if options.fp32 else "bf16",
        "halo": options.halo,
        "attention": options.attention,
    }

    def save(cases: list[dict[str, Any]], longest: dict[str, Any]) -> None:
        result.update(cases=cases, ratio=ratios(cases), longest=longest)
        if options.out:
            write_json(options.out, result)

    runs = Runs(plan, words, time.monotonic() + options.budget_seconds, save)
    runs.measure(options.seconds, options.modes, options.iterations, options.warmup)
    if options.longest:
        memory = torch.cuda.get_device_properties(0).total_memory if options.on == "cuda" else 0
        runs.find_longest(options.modes, options.longest, memory)
    return result


COMMAND = Command(run=run, options=(ParallelBenchOptions,), description=__doc__ or "")
