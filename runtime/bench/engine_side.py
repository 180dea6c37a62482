"""Our side: the recipe's backend, opened on random weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longtake.formats.bundle import Bundle
from longtake.paths import ENGINES, EXPORTS
from longtake.runtime.backends.base import Backend
from longtake.runtime.bench.gpu import device_from_name
from longtake.runtime.bench.measure import Save, measure
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.random_weights import random_weights


def engine_folder(options: BenchOptions) -> Path:
    """Where the recipe's plans are, or will be."""
    return (Path(options.engines) if options.engines else ENGINES) / options.the_recipe.name


def export_folder(options: BenchOptions) -> Path:
    """Where the recipe's ONNX files are, or will be."""
    return (Path(options.onnx) if options.onnx else EXPORTS) / options.the_recipe.onnx_name


def networks_needed(options: BenchOptions) -> tuple[str, ...]:
    """Networks of the engine spec that the measured stages run; never the text encoder."""
    dit = ("context", "dit") if "dit" in options.networks else ()
    return (*dit, *(("vae_first", "vae_steady") if "vae" in options.networks else ()))


def open_engines(options: BenchOptions) -> Backend:
    """The recipe's backend: its plans with random weights on a GPU; without one, ONNX Runtime on an exported package."""
    device = device_from_name(options.device)
    if device.type == "cpu":
        from longtake.runtime.backends.reference import ReferenceBackend

        return ReferenceBackend(export_folder(options), options.the_recipe, "no GPU here: timings are not figures")
    folder = engine_folder(options)
    onnx, wanted, decode_device = Bundle.read(folder).onnx, networks_needed(options), decode_device_from(options)
    places = {name: (decode_device or device) if name.startswith("vae") else device for name in wanted}
    from longtake.runtime.backends.trt.open import backend_from_engines

    return backend_from_engines(
        options.the_recipe.mode, folder, device=device, reason="random weights made on the device", networks=wanted, decode_device=decode_device,
        weights={name: random_weights(onnx / f"{name}.onnx", place) for name, place in places.items()},
    )  # fmt: skip


def decode_device_from(options: BenchOptions) -> torch.device | None:
    """The GPU that decodes, if it was named."""
    return torch.device(options.decode_device) if options.decode_device else None


def measure_engine(options: BenchOptions, save: Save) -> dict[str, Any]:
    """The figures of our side."""
    promised = budget(options)  # before anything is allocated
    save({"budget": promised})
    started = time.perf_counter()
    backend = open_engines(options)
    save({"open_s": round(time.perf_counter() - started, 2)})
    try:
        try:
            figures = measure(backend, options, save)
        finally:
            save({"memory": attempt(lambda: memory(backend, options, promised))})
        if backend.device.type == "cuda" and "dit" in options.networks:
            from longtake.runtime.bench.breakdown import dit_breakdown

            gc.collect()
            save(figures | {"dit_pass_ms": attempt(lambda: dit_breakdown(backend))})  # after the peak was taken
        return figures
    finally:
        backend.close()


def budget(options: BenchOptions) -> dict[str, Any]:
    """What `longtake budget` promises for this run, or why that is not known."""

    def work_out() -> dict[str, Any]:
        from longtake.formats.bundle import Bundle
        from longtake.formats.memory import Use, gigabytes
        from longtake.runtime.budget.use import budget_of

        folder = engine_folder(options)
        built = Bundle.read(folder) if (folder / "bundle.json").is_file() else None
        use = Use(
            decode="vae" in options.networks, decode_apart=bool(options.decode_device),
            engines=folder if built else None, recorded=built.memory if built else (),
        )  # fmt: skip
        found = budget_of(options.the_recipe, use)
        apart = {} if found.one_gpu else {f"{place}_gb": gigabytes(found.total(place)) for place in found.peak}
        return found.as_json() | apart

    return attempt(work_out)


def memory(backend: Backend, options: BenchOptions, promised: dict[str, Any]) -> dict[str, Any]:
    """Promised beside measured, step by step as the driver saw it and term by term; {} without a GPU."""
    from longtake.runtime.budget.measured import measured_terms, memory_rows, record_arenas

    if backend.device.type != "cuda" or not backend.memory_rows:
        return {}
    folder = engine_folder(options)
    if (folder / "bundle.json").is_file():
        record_arenas(folder, backend)
    found = measured_terms(backend)
    terms = [{"term": term["name"], "known": term["known"], "promised_gb": term["gb"],
              "measured_gb": round(found[term["name"]] / 1e9, 3) if term["name"] in found else None}
             for term in promised.get("terms", [])]  # fmt: skip
    steps = memory_rows(backend.memory_rows, promised)
    return {"steps": steps, "terms": terms, "total_measured_gb": round(backend.peak_bytes() / 1e9, 3),
            "total_promised_gb": promised.get("total_gb")}  # fmt: skip


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` yields, or {"error": why not}: a side figure must not cost the benchmark."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}"}
