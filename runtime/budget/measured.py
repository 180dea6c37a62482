"""What an opened backend really took, by the names of the budget's terms: beside the budget, and for the next one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake.files import sha256, write_json
from longtake.formats.memory import DECODER, LANES, MEASURED, PLAIN, TWICE, WORKING, gigabytes
from longtake.runtime.backends.base import Backend, State

log = logging.getLogger(__name__)


def measured_terms(backend: Backend, states: Iterable[State] = ()) -> dict[str, int]:
    """Bytes by the name of a budget's term, of a backend on TensorRT plans that has generated a chunk.

    "total" is the peak as the driver counts it. `states` are the sessions' K/V caches.
    """
    weights = {name: network.weight_tensors for name, network in backend.networks.items() if network.weight_tensors}
    found = {f"weights, {name}": _nbytes(weights[name]) for name in weights if name in PLAIN}
    if decoder := [tensor for name in DECODER for tensor in weights.get(name, [])]:
        found["weights, VAE decoder"] = _nbytes({tensor.data_ptr(): tensor for tensor in decoder}.values())
    found |= {WORKING[lane]: size for lane, size in arena_sizes(backend).items()}
    found |= backend.sizes
    cached = _nbytes(tensor for state in states for tensor in state.tensors.values())
    return found | ({"K/V cache": cached} if cached else {}) | {"total": backend.peak_bytes()}


def arena_sizes(backend: Backend) -> dict[str, int]:
    """Bytes of each lane's arena, which the lane's networks share."""
    networks = backend.networks
    sizes = {lane: [networks[n].arena.size for n in names if n in networks] for lane, names in LANES.items()}
    return {lane: max(found) for lane, found in sizes.items() if found}


def record_arenas(engines: Path, backend: Backend) -> None:
    """Write down what only loaded engines tell, so that the next budget of these engines has it."""
    sizes = arena_sizes(backend)
    if not sizes:
        return
    try:
        arenas = sizes | {TWICE: backend.twice_bytes}
        found = {"bundle": sha256(engines / "bundle.json"), "arena_bytes": arenas}
        write_json(engines / MEASURED, found)
    except OSError as error:  # a read-only folder: the next budget estimates again
        log.info("cannot write %s: %s", engines / MEASURED, error)


def memory_rows(log_rows: Sequence[Mapping[str, Any]], budget: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Step by step: what the driver says it added beside what the budget promised for it, in GB.

    Args:
        log_rows: of backends/memory_log.py.
        budget: Budget.as_json().

    Returns:
        {"step", "terms", "gb" (driver, after it), "added_gb", "promised_gb" (of its terms, once each),
        "slack_gb" (held by torch without a tensor in it), "outside_gb" (not torch's: context, kernels, libraries),
        "highest_gb" (at most so far, between steps too)}.
    """
    promised = {term["name"]: term["bytes"] for term in budget.get("terms", [])}
    rows, before = [], 0
    for row in log_rows:
        own = sum(promised.pop(name, 0) for name in row["terms"])
        rows.append({
            "step": row["step"], "terms": list(row["terms"]), "gb": gigabytes(row["bytes"]),
            "added_gb": gigabytes(row["bytes"] - before), "promised_gb": gigabytes(own),
            "slack_gb": gigabytes(row["reserved_bytes"] - row["torch_bytes"]),
            "outside_gb": gigabytes(row["bytes"] - row["reserved_bytes"]),
            "highest_gb": gigabytes(row.get("highest_bytes", row["bytes"])),
        })  # fmt: skip
        before = row["bytes"]
    return rows


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
