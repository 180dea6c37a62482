"""What an opened backend really took, by the names of the budget's terms: beside the budget, and for the next one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake.runtime.backends.base import Backend, Cache
from longtake.runtime.budget_terms import DECODER, MEASURED, PLAIN
from longtake.runtime.files import sha256, write_json

log = logging.getLogger(__name__)

LANES = {"denoise": PLAIN, "decode": DECODER}


def measured_terms(backend: Backend, caches: Iterable[Cache] = ()) -> dict[str, int]:
    """Bytes by the name of a budget's term, of a backend on TensorRT plans that has generated a chunk.

    "total" is the peak as the driver counts it. `caches` are the sessions' K/V caches. For `Budget.against`.
    """
    networks = {name: network for name, network in _networks(backend).items() if hasattr(network, "graph")}
    weights = {name: [network._fixed[w] for w in network.graph.weights] for name, network in networks.items()}
    found = {f"weights, {name}": _nbytes(weights[name]) for name in weights if name in PLAIN}
    if decoder := [tensor for name in DECODER for tensor in weights.get(name, [])]:
        found["weights, VAE decoder"] = _nbytes({tensor.data_ptr(): tensor for tensor in decoder}.values())
    for lane, size in scratch_sizes(backend, "scratch").items():
        found[f"{lane} scratch"] = size
    for lane, size in scratch_sizes(backend, "arena").items():
        found["DiT arena" if lane == "denoise" else "VAE arena"] = size
    found["static buffers"] = _nbytes(getattr(backend, "_static", {}).values())
    cached = _nbytes(tensor for cache in caches for layer in cache for tensor in layer)
    return found | ({"K/V cache": cached} if cached else {}) | {"total": backend.peak_bytes()}


def scratch_sizes(backend: Backend, kind: str) -> dict[str, int]:
    """Bytes of each lane's "scratch" or "arena", which the lane's networks share."""
    networks = _networks(backend)
    sizes = {lane: [getattr(networks[n], kind).size for n in names if n in networks and hasattr(networks[n], kind)]
             for lane, names in LANES.items()}  # fmt: skip
    return {lane: max(found) for lane, found in sizes.items() if found}


def record_scratch(engines: Path, backend: Backend) -> None:
    """Write down what only loaded engines tell, so that the next budget of these engines has it."""
    sizes = scratch_sizes(backend, "scratch")
    if not sizes:
        return
    try:
        write_json(engines / MEASURED, {"bundle": sha256(engines / "bundle.json"), "scratch_bytes": sizes})
    except OSError as error:  # a read-only folder: the next budget estimates again
        log.info("cannot write %s: %s", engines / MEASURED, error)


def _networks(backend: Backend) -> dict[str, Any]:
    return dict(getattr(backend, "networks", {}))


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
