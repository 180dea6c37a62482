"""The same session on several GPUs that share it, to stand beside one: the plans of their parts, on random weights."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from functools import partial
from typing import Any

from longtake.formats.memory import Use
from longtake.runtime.bench.engine_side import attempt, engine_folder, use_of, wanted_networks
from longtake.runtime.bench.gpu import device_from_name
from longtake.runtime.bench.measure import Save, measure
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.budget.check import check_ranks
from longtake.runtime.budget.use import budget_of
from longtake.runtime.parallel.backend import ShardedBackend
from longtake.runtime.parallel.open import sharded_backend

EXCHANGES = "gather_"  # what the steps begin with that are exchanges


def open_ranks(options: BenchOptions) -> ShardedBackend:
    """The recipe's plans on --gpus ranks; without a GPU processes on the CPU, in PyTorch, on the shipped checkpoint."""
    recipe = options.the_recipe
    if device_from_name(options.device).type == "cpu":
        return sharded_backend(recipe, None, options.gpus, "cpu")
    folder, wanted = engine_folder(options), wanted_networks(options)
    return sharded_backend(
        recipe,
        None,
        options.gpus,
        options.device or None,
        engines=folder,
        networks=wanted,
        made_up=True,
        before=partial(check_ranks, recipe, use_of_ranks(options)),
    )


def use_of_ranks(options: BenchOptions) -> Use:
    """What each of them is used for, as the budget sees it."""
    return replace(use_of(options), ranks=options.gpus)


def measure_ranks(options: BenchOptions, save: Save) -> dict[str, Any]:
    """The figures of the first rank, by the same stages as those of one GPU."""
    promised = attempt(lambda: budget_of(options.the_recipe, use_of_ranks(options)).as_json())
    save({"budget": promised})  # of the first rank, which takes the most
    started = time.perf_counter()
    backend = open_ranks(options)
    save({"gpus": options.gpus, "open_s": round(time.perf_counter() - started, 2)})
    try:
        figures = measure(backend, options, save)
        if "dit" in options.networks:
            gc.collect()  # the session that was measured: its cache on every rank
            save(figures | {"communication": attempt(lambda: communication(backend.pass_ms()))})
        return figures
    finally:
        backend.close()


def communication(steps: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a clean pass that its all-to-alls take, waiting for a slower rank among it, and their share; steps: see
    `ShardedBackend.pass_ms`. {} if nothing was measured by steps."""
    if not steps.get("sum"):
        return {}
    spent = sum(ms for name, ms in steps.items() if name.startswith(EXCHANGES))
    return {"ms": round(spent, 3), "share": round(spent / steps["sum"], 4), **steps}
