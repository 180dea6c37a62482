"""Our side: the recipe's backend, opened on random weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longtake.formats.bundle import Bundle
from longtake.formats.memory import Use
from longtake.formats.model_name import folder_of
from longtake.runtime.backends.base import Backend
from longtake.runtime.bench.gpu import device_from_name
from longtake.runtime.bench.measure import Save, measure
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.random_weights import random_weights
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset

SKELETON = "skeleton"  # the model that has no weights


def engine_folder(options: BenchOptions) -> Path:
    """Where the recipe's plans are, or will be."""
    recipe = options.the_recipe
    return Path(options.engines) / recipe.name if options.engines else folder_of(SKELETON, recipe) / "engines"


def export_folder(options: BenchOptions) -> Path:
    """Where the recipe's ONNX files are, or will be."""
    recipe = options.the_recipe
    if options.onnx:
        return Path(options.onnx) / recipe.onnx_name
    on_cpu = device_from_name(options.device).type == "cpu"  # ONNX Runtime takes the checkpoint's own weights
    return folder_of(Path(recipe.model.checkpoints).name if on_cpu else SKELETON, recipe) / "onnx"


def open_engines(options: BenchOptions, kept: int = 0) -> Backend:
    """The recipe's backend: its plans with random weights on a GPU; without one, ONNX Runtime on an exported package.
    kept: how many layers keep their window."""
    device = device_from_name(options.device)
    if device.type == "cpu":
        from longtake.runtime.backends.reference import ReferenceBackend

        return ReferenceBackend(export_folder(options), options.the_recipe, "no GPU here: timings are not figures")
    folder, wanted = engine_folder(options), wanted_networks(options)
    onnx = Bundle.read(folder).onnx
    decode_device = torch.device(options.decode_device) if options.decode_device else None
    places = {name: (decode_device or device) if name.startswith("vae") else device for name in wanted}
    from longtake.runtime.backends.trt.open import backend_from_engines

    return backend_from_engines(
        options.the_recipe.mode,
        folder,
        device=device,
        reason="random weights made on the device",
        networks=wanted,
        decode_device=decode_device,
        kept_windows=kept,
        weights={name: random_weights(onnx / f"{name}.onnx", place) for name, place in places.items()},
    )


def wanted_networks(options: BenchOptions) -> tuple[str, ...]:
    """What is loaded: never the text encoder."""
    dit = dit_networks(options.model) if "dit" in options.networks else ()
    return (*dit, *(("vae_first", "vae_steady") if "vae" in options.networks else ()))


def dit_networks(preset: Preset) -> tuple[str, ...]:
    """What a session runs besides text and decoder: of a model with cameras also what encodes its first picture."""
    if "camera" not in family_of(preset).can:
        return "context", "dit"
    return "context", "camera", "dit", "vae_encoder_first", "vae_encoder_steady"


def measure_engine(options: BenchOptions, save: Save) -> dict[str, Any]:
    """The figures of our side."""
    kept, chosen = windows(options)  # before anything is allocated
    promised = attempt(lambda: budget(options, kept))
    save({"budget": promised})
    started = time.perf_counter()
    backend = open_engines(options, kept)
    told = {"layers": 0, "of": options.model.dit.layers, **backend.windows, "chosen": chosen} if chosen else {}
    save({"open_s": round(time.perf_counter() - started, 2), "kept_windows": told})
    try:
        try:
            figures = measure(backend, options, save)
        finally:
            save({"memory": attempt(lambda: memory(backend, options, promised))})
        if backend.device.type == "cuda" and "dit" in options.networks:
            from longtake.runtime.profile.gpu import pass_ms

            gc.collect()
            save(figures | {"dit_pass_ms": attempt(lambda: pass_ms(backend))})  # after the peak was taken
        return figures
    finally:
        backend.close()


def windows(options: BenchOptions) -> tuple[int, str]:
    """How many layers keep their window, and why; none without a GPU or the DiT."""
    from longtake.runtime.budget.check import kept_windows

    device = device_from_name(options.device)
    if device.type == "cpu" or "dit" not in options.networks:
        return 0, ""
    return kept_windows(options.the_recipe, use_of(options), device, options.kept_windows)


def budget(options: BenchOptions, kept: int) -> dict[str, Any]:
    """What `longtake budget` promises for this run."""
    from longtake.formats.memory import gigabytes
    from longtake.runtime.budget.use import budget_of

    promised = budget_of(options.the_recipe, replace(use_of(options), kept_windows=kept))
    apart = {} if promised.one_gpu else {f"{place}_gb": gigabytes(promised.total(place)) for place in promised.peak}
    return promised.as_json() | apart


def use_of(options: BenchOptions) -> Use:
    """What is run, for the budget."""
    folder = engine_folder(options)
    built = Bundle.read(folder) if (folder / "bundle.json").is_file() else None
    return Use(
        decode="vae" in options.networks,
        encode="vae_encoder_first" in dit_networks(options.model),
        decode_apart=bool(options.decode_device),
        engines=folder if built else None,
        recorded=built.memory if built else (),
    )


def memory(backend: Backend, options: BenchOptions, promised: dict[str, Any]) -> dict[str, Any]:
    """Promised beside measured, step by step as the driver saw it and term by term; {} without a GPU."""
    from longtake.runtime.budget.measured import measured_terms, memory_rows, record_arenas

    if backend.device.type != "cuda" or not backend.memory_rows:
        return {}
    folder = engine_folder(options)
    if (folder / "bundle.json").is_file():
        record_arenas(folder, backend)
    measured = {name: round(size / 1e9, 3) for name, size in measured_terms(backend).items()}
    terms = [
        {
            "term": term["name"],
            "known": term["known"],
            "promised_gb": term["gb"],
            "measured_gb": measured.get(term["name"]),
        }
        for term in promised.get("terms", [])
    ]
    steps, peak = memory_rows(backend.memory_rows, promised), round(backend.peak_bytes() / 1e9, 3)
    return {"steps": steps, "terms": terms, "total_measured_gb": peak, "total_promised_gb": promised.get("total_gb")}


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` yields, or {"error": why not}: a side figure must not cost the benchmark."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}"}
