"""Our side: the recipe's backend, opened on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longtake.engines.bundle import load_bundle
from longtake.runtime.backends.base import Backend
from longtake.runtime.bench.gpu import device_from_name
from longtake.runtime.bench.measure import Save, measure
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.random_weights import random_weights
from longtake.runtime.places import ENGINES, EXPORTS


def engine_folder(options: BenchOptions) -> Path:
    """Where the recipe's plans are, or will be."""
    return Path(options.engines) if options.engines else ENGINES / options.recipe


def export_folder(options: BenchOptions) -> Path:
    """Where the recipe's ONNX files are, or will be."""
    return Path(options.onnx) if options.onnx else EXPORTS / options.the_recipe.onnx_name


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
    from importlib import import_module

    folder = engine_folder(options)
    onnx = load_bundle(folder).onnx
    wanted = networks_needed(options)
    weights = {name: random_weights(onnx / f"{name}.onnx", device) for name in wanted}
    module = import_module(f"longtake.runtime.backends.{options.the_recipe.mode}")
    return module.open_backend(
        folder, device=device, reason="random weights made on the device", weights=weights, networks=wanted
    )


def measure_engine(options: BenchOptions, save: Save) -> dict[str, Any]:
    """The figures of our side."""
    backend = open_engines(options)
    try:
        return measure(backend, options, save)
    finally:
        backend.close()
