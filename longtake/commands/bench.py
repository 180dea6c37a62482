"""`longtake bench`: prepare, measure each part in a process of its own, write the report after every one."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from longtake.devices import torch_device
from longtake.errors import LongtakeError
from longtake.files import read_json, write_json
from longtake.formats.bundle import Bundle
from longtake.formats.exported import Export
from longtake.formats.recipe import recipe_named
from longtake.options import Command, option
from longtake.paths import REPOSITORY
from longtake.runtime.bench.engine_side import engine_folder, export_folder
from longtake.runtime.bench.gpu import device_from_name
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.plot import write_plot
from longtake.runtime.bench.result import Figures, report_of, table, write_result
from longtake.runtime.parallel.open import require_cut, require_devices, require_split
from longtake.training.models.network_spec import rank_network

EPILOG = """weights are random and made on the device, so no checkpoint is needed; speed does not depend on their values.
examples:
  longtake bench --recipe wan2.2-ti2v-5b_fp8_sm90 --against torch
  longtake bench --recipe wan2.2-ti2v-5b_fp8_sm90 --more wan2.2-ti2v-5b_bf16_sm90 --against torch
  longtake bench --recipe wan2.2-ti2v-5b_bf16_sm90 --quick --networks dit
  longtake bench --recipe wan2.2-ti2v-5b_fp8_sm90 --gpus 2
  longtake bench --recipe tiny_w4a16_sm90 --steps 2       # on a CPU: the reference backend, to try it out
"""
# What one part may take of the whole limit: a part that hangs must not cost the others.
PART_SECONDS = {
    "engine": 270,
    "ranks": 270,
    "torch": 150,
    "torch_vae": 120,
    "torch_compile": 260,
    "torch_autotune": 300,
}
OURS = ("engine", "ranks")  # parts of each recipe; the others are PyTorch's, for all of them
MODULE = "longtake.runtime.bench.worker"


@dataclass(frozen=True)
class MoreOptions:
    """What is measured with it"""

    more: tuple[str, ...] = option((), metavar="NAME")
    """recipes whose DiT is measured in the same run, against the same PyTorch; a report each, in --out/NAME (default: none)"""


def run(options: BenchOptions, others: MoreOptions) -> int:
    """Measure and report; 1 if a part failed (the others are reported all the same)."""
    options, started = completed(options), time.perf_counter()
    options.require_plain()
    for name, given in (("--device", options.device), ("--decode-device", options.decode_device)):
        torch_device(given or "cpu", name)  # before anything is exported
    more = [of_another_recipe(options, name) for name in others.more]
    if options.gpus > 1:
        require_split(options.model, options.gpus)
    for one in (options, *more):
        prepare(one)
    runs: list[tuple[BenchOptions, dict[str, Figures]]] = [(one, {}) for one in (options, *more)]

    def measure(part: str, one: BenchOptions) -> Figures:
        left = options.seconds - (time.perf_counter() - started)
        limit = min(left, PART_SECONDS.get(part, left))
        print(f"{one.the_recipe.name}, {part}: measuring (up to {limit:.0f} s)", flush=True)
        figures = measured(part, one, limit)
        print(f"{part}: {figures.get('error') or figures.get('fps')}", flush=True)
        return figures

    for one, parts in runs:
        for part in one.parts():
            if part in OURS:
                parts[part] = measure(part, one)
                write_result(one.folder, report_of(one, parts))
    for part in (part for part in options.parts() if part not in OURS):
        figures = measure(part, options)
        for one, parts in runs:
            parts[part] = figures
            write_result(one.folder, report_of(one, parts))
    for one, parts in runs:
        report = report_of(one, parts)
        print(table(report))
        print(f"report: {write_result(one.folder, report)}")
        print(f"plot:   {write_plot(report, one.folder / 'bench.png')}")
    return int(any("error" in figures for _, parts in runs for figures in parts.values()))


def completed(options: BenchOptions) -> BenchOptions:
    """With a place for what is written. Raises LongtakeError for an unknown recipe."""
    found = recipe_named(options.recipe)
    recipe = str(Path(options.recipe).resolve()) if options.recipe.endswith((".yaml", ".yml")) else found.name
    out = options.out or str(Path("runs") / "bench" / Path(options.recipe).stem)
    onnx, engines = (str(Path(given).resolve()) if given else "" for given in (options.onnx, options.engines))
    return replace(options, recipe=recipe, out=out, onnx=onnx, engines=engines)  # a part runs in another folder


def of_another_recipe(options: BenchOptions, name: str) -> BenchOptions:
    """The same benchmark of another recipe's DiT. Raises LongtakeError for an unknown recipe or another preset."""
    recipe = recipe_named(name)
    if recipe.model != options.the_recipe.model:
        what, got = "--more takes recipes of the same preset", recipe.preset
        expected, fix = options.the_recipe.preset, "run the benchmark twice"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    name = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
    return replace(
        options, recipe=name, networks=("dit",), decode_device="", gpus=1, out=str(options.folder / recipe.name)
    )


def prepare(options: BenchOptions) -> None:
    """Export (graphs without weights) and build what is not there yet; on a CPU only the export is needed."""
    name, onnx, out = options.recipe, export_folder(options), engine_folder(options)
    exports = ["--out", str(onnx.parent)] if options.onnx else []
    if device_from_name(options.device).type == "cpu":
        if not Export.is_in(onnx):
            _longtake("export", "--recipe", name, "--no-parity", *exports)
        checked = Export.read(onnx, digests=False).checked
    else:
        if options.gpus > 1:
            require_cut(options.the_recipe, options.gpus)
            require_devices(options.gpus, options.device or None)
        if not built(out, options.gpus):
            if not Export.is_in(onnx):
                _longtake("export", "--recipe", name, "--skeleton", *exports)
            places = [
                *(["--onnx", str(onnx.parent)] if options.onnx else []),
                *(["--out", str(out.parent)] if options.engines else []),
            ]
            ranks = ["--gpus", str(options.gpus)] if options.gpus > 1 else []
            force = ["--force"] if options.force else []
            _longtake("engines", "--recipe", name, "--skeleton", *places, *ranks, *force)
        checked = Bundle.read(out).checked
    if line := checked.require(onnx, options.force):
        print(line)


def built(folder: Path, gpus: int) -> bool:
    """Whether the plans are there, those of one of `gpus` ranks among them."""
    if not (folder / "bundle.json").is_file():
        return False
    return gpus == 1 or f"{rank_network(gpus)}.segments.json" in Bundle.read(folder).files


def _longtake(*words: str) -> None:
    print("longtake", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "longtake", *words], cwd=REPOSITORY, check=False)
    if done.returncode:
        raise LongtakeError(f"`longtake {words[0]}` failed, nothing was measured", got=f"exit code {done.returncode}")


def measured(part: str, options: BenchOptions, seconds: float) -> Figures:
    """Run one part in a process; its figures, with "error" if it failed, crashed or took too long."""
    folder = options.folder / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    given, out = folder / "options.json", folder / f"{part}.json"
    write_json(given, options.as_json())
    out.unlink(missing_ok=True)
    if seconds < 10:
        return {"part": part, "error": f"no time left within --seconds {options.seconds}"}
    command = [sys.executable, "-m", MODULE, part, str(given.resolve()), str(out.resolve())]
    problem = ""
    try:
        with open(folder / f"{part}.log", "wb") as log:
            done = subprocess.run(command, cwd=REPOSITORY, timeout=seconds, stdout=log, stderr=log, check=False)
        problem = f"exit code {done.returncode}, see {folder / f'{part}.log'}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {seconds:.0f} s, see {folder / f'{part}.log'}"
    figures: Figures = read_json(out) if out.is_file() else {"part": part}
    return {"error": problem, **figures} if problem else figures


COMMAND = Command(
    run,
    (BenchOptions, MoreOptions),
    "Measure a recipe: DiT, VAE and end-to-end frames a second, stages, memory, roofline.",
    EPILOG,
)
