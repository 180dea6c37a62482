"""`longtake bench`: prepare, measure each part in a process of its own, write the report after every one."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError
from longtake.files import read_json, write_json
from longtake.formats.exported import Export
from longtake.formats.recipe import recipe_named
from longtake.paths import REPOSITORY
from longtake.runtime.bench.engine_side import engine_folder, export_folder
from longtake.runtime.bench.gpu import device_from_name
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.plot import write_plot
from longtake.runtime.bench.result import Figures, report_of, table, write_result

EPILOG = """weights are random and made on the device, so no checkpoint is needed; speed does not depend on their values.
examples:
  longtake bench --recipe wan2.2-ti2v-5b_fp8_sm90 --against torch
  longtake bench --recipe wan2.2-ti2v-5b_fp8_sm90 --more wan2.2-ti2v-5b_bf16_sm90 --against torch
  longtake bench --recipe wan2.2-ti2v-5b_bf16_sm90 --quick --networks dit
  longtake bench --recipe tiny_w4a16_sm90 --steps 2       # on a CPU: the reference backend, to try it out
"""
# What one part may take of the whole limit: a part that hangs must not cost the others.
PART_SECONDS = {"engine": 270, "torch": 150, "torch_vae": 120, "torch_compile": 200, "torch_autotune": 300}
MODULE = "longtake.runtime.bench.worker"


def register(subparsers: Any) -> None:
    """Add the `bench` command."""
    parser = subparsers.add_parser(
        "bench",
        help="speed and memory at full size, on random weights, against PyTorch",
        description="Measure a recipe: DiT, VAE and end-to-end frames a second, stages, memory, roofline.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="a shipped recipe or a .yaml file")
    parser.add_argument("--against", default="", metavar="torch", help="measure plain PyTorch in the same run, too")
    parser.add_argument(
        "--more", nargs="+", default=[], metavar="NAME",
        help="recipes whose DiT is measured in the same run, against the same PyTorch; a report each, in --out/NAME",
    )  # fmt: skip
    parser.add_argument("--networks", default="dit,vae", metavar="dit,vae", help="what to measure")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="denoise steps a chunk (default 4)")
    parser.add_argument("--chunks", type=int, metavar="N", help="steady chunks measured in each mode (default 4)")
    parser.add_argument("--warmup", type=int, metavar="K", help="chunks before that (default 5; the window's at least)")
    parser.add_argument("--quick", action="store_true", help="1 steady chunk, shortest warm-up")
    parser.add_argument("--autotune", action="store_true", help="also torch.compile with max-autotune (minutes)")
    parser.add_argument(
        "--engines",
        default="",
        metavar="FOLDER",
        help="plans are in FOLDER/RECIPE (default engines/build), built if absent",
    )
    parser.add_argument(
        "--onnx",
        default="",
        metavar="FOLDER",
        help="graphs are in FOLDER/PRESET_PRECISION (default export/build), exported if absent",
    )
    parser.add_argument("--device", default="", help="such as cuda:0")
    parser.add_argument("--decode-device", default="", help="decode on this GPU, such as cuda:1")
    parser.add_argument("--seconds", type=int, default=540, help="time limit of the whole (default 540)")
    parser.add_argument("--out", default="", metavar="FOLDER", help="default: runs/bench/RECIPE")
    parser.set_defaults(run=run)


def options_from_args(args: argparse.Namespace) -> BenchOptions:
    """The command line as options. Raises LongtakeError for an unknown recipe or value."""
    chunks, warmup = (1, 0) if args.quick else (4, 5)
    return BenchOptions(
        recipe=args.recipe if args.recipe.endswith((".yaml", ".yml")) else recipe_named(args.recipe).name,
        steps=args.steps,
        chunks=chunks if args.chunks is None else args.chunks,
        warmup=warmup if args.warmup is None else args.warmup,
        networks=tuple(part for part in args.networks.split(",") if part),
        against=args.against,
        engines=args.engines,
        onnx=args.onnx,
        device=args.device,
        decode_device=args.decode_device,
        out=args.out or str(Path("runs") / "bench" / Path(args.recipe).stem),
        seconds=args.seconds,
        autotune=args.autotune,
    )


def run(args: argparse.Namespace) -> int:
    """Measure and report; 1 if a part failed (the others are reported all the same)."""
    options, started = options_from_args(args), time.perf_counter()
    more = [of_another_recipe(options, name) for name in args.more]
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
        parts["engine"] = measure("engine", one)
        write_result(one.folder, report_of(one, parts))
    for part in options.parts()[1:]:
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


def of_another_recipe(options: BenchOptions, name: str) -> BenchOptions:
    """The same benchmark of another recipe's DiT. Raises LongtakeError for an unknown recipe or another preset."""
    recipe = recipe_named(name)
    if recipe.preset != options.the_recipe.preset:
        raise LongtakeError("--more takes recipes of the same preset", got=recipe.preset,
                            expected=options.the_recipe.preset, fix="run the benchmark twice")  # fmt: skip
    return replace(options, recipe=name, networks=("dit",), decode_device="", out=str(options.folder / recipe.name))


def prepare(options: BenchOptions) -> None:
    """Export (graphs without weights) and build what is not there yet; on a CPU only the export is needed."""
    name = options.the_recipe.name
    if device_from_name(options.device).type == "cpu":
        if not Export.is_in(export_folder(options)):
            _longtake("export", "--recipe", name, "--no-parity", "--out", str(export_folder(options).parent))
    elif not (engine_folder(options) / "bundle.json").is_file():
        if not Export.is_in(export_folder(options)):
            _longtake("export", "--recipe", name, "--skeleton", "--out", str(export_folder(options).parent))
        onnx, out = export_folder(options).parent, engine_folder(options).parent
        _longtake("engines", "--recipe", name, "--onnx", str(onnx), "--out", str(out))


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
