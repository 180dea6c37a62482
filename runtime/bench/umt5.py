"""Latency and memory of umT5-XXL on this machine's GPU, with random weights: every storage, paged and resident, as JSON."""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longtake.options import Command, option
from longtake.runtime.bench.gpu import synchronize
from longtake.training.models.presets import WAN22_TI2V_5B, TextEncoderConfig
from longtake.training.models.text.umt5 import UMT5
from longtake.training.models.text.umt5_paged import STORAGES, WORKING, PagedUMT5, WeightSource, device_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One way of storing it. Bytes are of the device but for host_bytes; promised and measured are while it encodes.

    loading_s: making and storing random weights, not reading a file. error: of the embeddings, relative to bf16's.
    """

    storage: str
    resident: bool
    promised_bytes: int
    peak_bytes: int
    held_bytes: int
    host_bytes: int
    loading_s: float
    first_ms: float
    ms: float
    error: float


def random_source(config: TextEncoderConfig, device: torch.device, seed: int = 0) -> WeightSource:
    """Weights as T5 initialises them, made on `device` in bf16; the same for the same order of asking."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UMT5(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...], spread: float) -> Tensor:
        return torch.randn(shape, dtype=WORKING, device=device, generator=generator) * spread

    def weight(name: str) -> Tensor:
        shape = tuple(shapes[name])
        if "norm" in name:
            return torch.ones(shape, dtype=WORKING, device=device)
        if name == "embedding.weight":  # a thousand different rows will do
            return normal((1024, shape[1]), 1.0).cpu().repeat(-(-shape[0] // 1024), 1)[: shape[0]]
        if name.endswith("attn.q.weight"):  # T5 has no scale in its attention; its initialisation has
            return normal(shape, (config.dim * config.dim // config.heads) ** -0.5)
        return normal(shape, config.dim**-0.5 if "position" in name else shape[1] ** -0.5)

    return lambda names: ((name, weight(name)) for name in sorted(names))


def rows(config: TextEncoderConfig, device: torch.device, repeats: int) -> list[Row]:
    """Measure every storage, resident and paged, on one full-length prompt."""
    tokens = torch.randint(2, config.vocabulary, (1, config.length), generator=torch.Generator().manual_seed(1))
    wanted: Tensor | None = None
    measurements: list[Row] = []
    for storage in STORAGES:
        for resident in (True, False):
            row, got = measured(config, device, storage, resident, tokens.int(), repeats)
            wanted = got if wanted is None else wanted
            measurements.append(replace(row, error=float((got - wanted).norm() / wanted.norm())))
            logger.info("%s", measurements[-1])
    return measurements


def measured(
    config: TextEncoderConfig, device: torch.device, storage: str, resident: bool, tokens: Tensor, repeats: int
) -> tuple[Row, Tensor]:
    """One row (its error left 0), and the embeddings on the host."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    start = time.perf_counter()
    encoder = PagedUMT5(config, random_source(config, device), device, storage, resident)
    synchronize(device)
    loading = time.perf_counter() - start
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) - before if cuda else 0
    first = timed(lambda: encoder(tokens), device)
    times = [timed(lambda: encoder(tokens), device) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    promised = device_bytes(config, storage, resident)
    row = Row(
        storage, resident, promised, peak, held, encoder.host_bytes, loading, first, statistics.median(times), 0.0
    )
    return row, encoder(tokens).cpu()


def timed(call: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds until the device has done `call`, the host's part included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def report(config: TextEncoderConfig, device: torch.device, repeats: int) -> dict[str, Any]:
    """What the command prints."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    measured = [asdict(row) for row in rows(config, device, repeats)]
    return {"device": name, "torch": torch.__version__, "config": asdict(config), "rows": measured}


@dataclass(frozen=True)
class EncoderOptions:
    """What"""

    device: str | None = option(None, metavar="NAME")
    """cpu or cuda:N (default: the GPU, if there is one)"""
    layers: int = option(WAN22_TI2V_5B.text.layers, metavar="N")
    """fewer for a dry run"""
    repeats: int = option(10, metavar="N")
    """runs, of which the median counts"""


def run(options: EncoderOptions) -> int:
    """Print the report."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = replace(WAN22_TI2V_5B.text, layers=options.layers)
    sys.stdout.write(json.dumps(report(config, device, options.repeats), indent=2) + "\n")
    return 0


COMMAND = Command(run=run, options=(EncoderOptions,), description=__doc__ or "")
