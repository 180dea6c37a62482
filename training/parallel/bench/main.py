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
import sys
from typing import Any

import torch

from longtake.files import write_json
from longtake.options import Command
from longtake.provenance import origin
from longtake.training.parallel.bench.options import ParallelBenchOptions
from longtake.training.parallel.bench.runs import Runs
from longtake.training.parallel.bench.table import ratios, table
from longtake.training.parallel.ranks import started_by_torchrun
from longtake.training.parallel.sharding import require_heads


def run(options: ParallelBenchOptions) -> int:
    """Measure everything asked for; under torchrun, rank 0 does and the others have nothing to do."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    if started_by_torchrun() and os.environ["RANK"] != "0":
        return 0
    ranks = options.nproc or int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    result = bench(options, ranks)
    sys.stdout.write(json.dumps(result, indent=2) + "\n\n" + table(result) + "\n")
    return 0


def bench(options: ParallelBenchOptions, ranks: int) -> dict[str, Any]:
    """The report."""
    preset = options.sized
    require_heads(preset, ranks)
    result: dict[str, Any] = {
        "kind": "bench",
        **origin(),
        "preset": preset.name,
        "layers": preset.dit.layers,
        "resolution": f"{preset.width}x{preset.height}",
        "gpu": torch.cuda.get_device_name() if options.on == "cuda" else None,
        "ranks": ranks,
        "precision": "fp32" if options.fp32 else "bf16",
        "halo": options.halo,
        "attention": options.attention,
    }

    def save(cases: list[dict[str, Any]], longest: dict[str, Any]) -> None:
        result.update(cases=cases, ratio=ratios(cases), longest=longest)
        if options.out:
            write_json(options.out, result)

    runs = Runs(options, ranks, save)
    runs.measure()
    if options.longest:
        runs.find_longest(options.longest)
    return result


COMMAND = Command(run=run, options=(ParallelBenchOptions,), description=__doc__ or "")
