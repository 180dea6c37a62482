"""Balanced against naive sequence parallelism and none, from one run: `python -m longtake.training.parallel.bench`.

  torchrun --nproc-per-node 2 -m longtake.training.parallel.bench --layers 8 --seconds 16 32 --out bench.json
  python -m longtake.training.parallel.bench --nproc 2 --preset tiny --device cpu --layers 1 --seconds 2 --iterations 1

Every mode and length runs in processes of its own, so that one that runs out of memory is a result and not the end.
With --mode none every rank has a sample of its own: an iteration is then as many samples as ranks, and "s_per_sample"
is what to compare throughput by. Under the others all ranks share one sample.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from longtake.runtime.errors import LongtakeError
from longtake.runtime.files import write_json
from longtake.runtime.report import commit, cpu_name, versions
from longtake.training.parallel.bench_worker import Case, measure, sequence_of, sized
from longtake.training.parallel.layout import MODES, NONE
from longtake.training.parallel.ranks import join_ranks, launcher_variables, started_by_torchrun
from longtake.training.parallel.sharding import require_heads
from longtake.training.presets import PRESETS, Preset, preset_named

logger = logging.getLogger(__name__)

WAYS = (*MODES, NONE)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m longtake.training.parallel.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--preset", default="wan2.2-ti2v-5b", choices=sorted(PRESETS))
    p.add_argument(
        "--layers", type=int, default=8, help="depth of the transformer (default 8); widths are the preset's"
    )
    p.add_argument("--height", type=int, help="pixels (default: the preset's)")
    p.add_argument("--width", type=int)
    p.add_argument("--seconds", type=float, nargs="+", default=[16, 32], help="lengths of the clip (default 16 32)")
    p.add_argument("--modes", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--iterations", type=int, default=2)
    p.add_argument("--warmup", type=int, default=1)
    p.add_argument("--no-vae", action="store_true", help="latents are there already")
    p.add_argument("--halo", default="even", choices=("even", "equal"), help="balanced: latents that each rank encodes "
                   "(even, default) or keeps (equal, as in the reference) are as many on every rank")  # fmt: skip
    p.add_argument("--attention", default="blocks", choices=("blocks", "flex"))
    p.add_argument("--fp32", action="store_true")
    p.add_argument("--longest", type=float, metavar="S", help="after that, in steps of 8 s and up to S seconds, the "
                   "longest clip that each mode fits: one iteration without warm-up each")  # fmt: skip
    p.add_argument("--limit", type=float, default=500, metavar="S", help="give a measurement up after S seconds")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    p.add_argument("--nproc", type=int, help="ranks, where torchrun didn't start this")
    p.add_argument("--out", type=Path, help="write the report there, too")
    p.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Measure everything asked for; under torchrun, rank 0 does and the others have nothing to do."""
    words = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.record:
            return worker(args)
        if started_by_torchrun() and os.environ["RANK"] != "0":
            return 0
        ranks = args.nproc or int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
        result = bench(args, ranks, "python -m longtake.training.parallel.bench " + shlex.join(words))
    except LongtakeError as error:
        sys.stderr.write(f"bench: error: {error}\n")
        return error.exit_code
    if args.out:
        write_json(args.out, result)
    sys.stdout.write(json.dumps(result, indent=2) + "\n\n" + table(result) + "\n")
    return 0


def worker(args: argparse.Namespace) -> int:
    """One mode at one length on one rank; the result goes to a file of the folder --record."""
    preset, mode = preset_of(args), args.modes[0]
    chunks = chunks_of(preset, args.seconds[0], int(os.environ["WORLD_SIZE"]))
    case = Case(mode, chunks, args.iterations, args.warmup, not args.no_vae, args.halo, args.attention, not args.fp32)
    with join_ranks(args.device, sequence_of(mode, int(os.environ["WORLD_SIZE"]))) as ranks:
        write_json(args.record / f"{ranks.rank}.json", measure(preset, case, ranks))
    return 0


def preset_of(args: argparse.Namespace) -> Preset:
    return sized(preset_named(args.preset), args.layers, args.height, args.width)


def chunks_of(preset: Preset, seconds: float, ranks: int) -> int:
    """Chunks of a clip of about `seconds`, a multiple of the ranks."""
    chunk = preset.chunk_latents * preset.vae.stride[0] / preset.fps
    return max(1, round(seconds / chunk / ranks)) * ranks


def bench(args: argparse.Namespace, ranks: int, command: str) -> dict[str, Any]:
    """The report."""
    preset = preset_of(args)
    require_heads(preset, ranks)
    cases = [measured(args, ranks, mode, seconds) for seconds in args.seconds for mode in args.modes]
    longest = {mode: longest_of(args, ranks, mode, cases) for mode in args.modes} if args.longest else {}
    return {
        "kind": "bench",
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": preset.name,
        "layers": preset.dit.layers,
        "resolution": f"{preset.width}x{preset.height}",
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "cpu": cpu_name(),
        "versions": versions(),
        "ranks": ranks,
        "precision": "fp32" if args.fp32 else "bf16",
        "halo": args.halo,
        "attention": args.attention,
        "cases": cases,
        "ratio": ratios(cases),
        "longest_s": longest,
    }


def measured(args: argparse.Namespace, ranks: int, mode: str, seconds: float, **changed: Any) -> dict[str, Any]:
    """One case in processes of its own."""
    settings = {**vars(args), **changed}
    preset = preset_of(args)
    chunks = chunks_of(preset, seconds, ranks)
    head = {
        "mode": mode,
        "seconds": round((1 + preset.vae.stride[0] * (preset.chunk_latents * chunks - 1)) / preset.fps, 2),
        "chunks": chunks,
        "tokens": 2 * chunks * preset.chunk_tokens,
        "samples": 1 if mode != NONE else ranks,
    }
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
                 "longtake.training.parallel.bench", "--record", folder, "--modes", mode, "--seconds", str(seconds)]  # fmt: skip
        for name in ("preset", "layers", "height", "width", "iterations", "warmup", "halo", "attention", "device"):
            words += [f"--{name}", str(settings[name])] if settings[name] is not None else []
        words += [f"--{name.replace('_', '-')}" for name in ("no_vae", "fp32") if settings[name]]
        failure = ran(words, args.limit)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    if failure or len(found) < ranks:
        logger.warning("%s at %.0f s: %s", mode, seconds, failure)
        return {**head, "failed": failure or "a rank left no result"}
    slowest = max(one["iteration_s"] for one in found)
    logger.info("%s at %.0f s: %.2f s an iteration", mode, seconds, slowest)
    return {
        **head,
        "s_per_iteration": slowest,
        "s_per_sample": slowest / head["samples"],
        "peak_gb": max(one["peak_gb"] for one in found),
        "ranks": found,
    }


def ran(words: list[str], limit: float) -> str | None:
    """Run a command; None, or why it failed in a few words."""
    env = {name: value for name, value in os.environ.items() if name not in launcher_variables()}
    env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    env.setdefault("OMP_NUM_THREADS", "1")
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    if done.returncode == 0:
        return None
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr:
        return "out of memory"
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    return (lines[0] if lines else f"exit code {done.returncode}")[:300]


def longest_of(args: argparse.Namespace, ranks: int, mode: str, cases: list[dict[str, Any]]) -> float:
    """Seconds of the longest clip that ran."""
    done = [case["seconds"] for case in cases if case["mode"] == mode and "failed" not in case]
    failed = [case["seconds"] for case in cases if case["mode"] == mode and "failed" in case]
    longest: float = max(done, default=0.0)
    seconds = 8 * (longest // 8 + 1)
    while seconds <= args.longest and seconds < min(failed, default=float("inf")):
        case = measured(args, ranks, mode, seconds, iterations=1, warmup=0)
        if "failed" in case:
            break
        longest, seconds = case["seconds"], seconds + 8
    return longest


def ratios(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Balanced SP against the other modes at the same length: times and memory, theirs divided by ours."""
    found = []
    for ours in cases:
        for theirs in cases:
            same = theirs["chunks"] == ours["chunks"] and theirs["mode"] != "balanced" == ours["mode"]
            if same and "failed" not in ours and "failed" not in theirs:
                names = ("s_per_iteration", "s_per_sample", "peak_gb")
                numbers = {name: round(theirs[name] / ours[name], 3) for name in names}
                found.append({"seconds": ours["seconds"], "against": theirs["mode"], **numbers})
    return found


def table(result: dict[str, Any]) -> str:
    """The report for reading, in Markdown."""
    lines = [
        f"{result['gpu'] or result['cpu']} x {result['ranks']}, {result['preset']} with {result['layers']} layers, "
        f"{result['resolution']}, {result['precision']}",
        "",
        "| mode | clip s | s / iteration | s / sample | VAE s by rank | loss tokens by rank | peak GB by rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        if "failed" in case:
            lines.append(f"| {case['mode']} | {case['seconds']} | {case['failed']} | | | | |")
            continue
        vae, tokens, peak = (
            ", ".join(f"{one[name]:{form}}" for one in case["ranks"])
            for name, form in (("vae_s", ".2f"), ("loss_tokens", "d"), ("peak_gb", ".1f"))
        )
        lines.append(
            f"| {case['mode']} | {case['seconds']} | {case['s_per_iteration']:.2f} | {case['s_per_sample']:.2f} "
            f"| {vae} | {tokens} | {peak} |"
        )
    for one in result["ratio"]:
        lines.append(
            f"\nat {one['seconds']} s, {one['against']} / balanced: {one['s_per_iteration']} per iteration, "
            f"{one['s_per_sample']} per sample, {one['peak_gb']} memory"
        )
    for mode, seconds in result["longest_s"].items():
        lines.append(f"\nlongest clip, {mode}: {seconds} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
