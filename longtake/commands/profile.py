"""`longtake profile`: where the time goes, layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longtake.files import write_json
from longtake.machine.capability import BACKENDS
from longtake.runtime.profile.profile import reference_profile, table, timing_feed, trtexec_profile
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import NETWORKS

OUT = Path("runs") / "profile"
Profile = tuple[str, str, list[dict[str, Any]]]  # network or plan, who measured it, rows


def register(subparsers: Any) -> None:
    """Add the `profile` command."""
    parser = subparsers.add_parser(
        "profile",
        help="time per layer, in trtexec's JSON format and as a table",
        description="Per-layer times: through trtexec where it is installed (plans without plugins), else through "
        "TensorRT's profiler or CUDA events; without a GPU, ONNX Runtime's on the CPU, which are no TensorRT figures.",
    )
    parser.add_argument("--engines", metavar="FOLDER", help="engines, exported networks, or a recipe's name")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="may be repeated (default: all)")
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="default: the one that fits")
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="runs that are averaged (default: 10)")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="layers shown a network (default: 12)")
    parser.add_argument("--without-trtexec", action="store_true", help="profile from Python even if trtexec is there")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="default: runs/profile")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Profile each network, print its table, write its JSON."""
    from longtake.errors import LongtakeError
    from longtake.runtime.sources import choose_backend, source_from_name

    if args.runs < 1:
        raise LongtakeError("bad number of runs", got=args.runs, expected="1 or more", fix="pass --runs 10")
    source = source_from_name(args.engines)
    choice = choose_backend(source, args.backend)
    print(f"backend {choice.backend}: {choice.reason}")
    names = args.network or list(NETWORKS)
    profiles = _reference(source, names, args.runs) if choice.backend == "reference" else _native(source, names, args)
    for name, measured_by, rows in profiles:
        path = args.out / source.recipe.name / f"{name}.json"
        write_json(path, rows)
        print(f"\n{name}, {measured_by} ({path}):")
        print("\n".join(table(rows, args.top)))
    return 0


def _reference(source: Any, names: list[str], runs: int) -> Iterator[Profile]:
    from longtake.formats.exported import Export
    from longtake.settings import settings_from_environment

    Export.read(source.onnx)
    threads = settings_from_environment().threads
    for name in names:
        feed = timing_feed(family_of(source.recipe.model).spec(source.recipe.model, source.recipe, name))
        rows = reference_profile(source.onnx / f"{name}.ort.onnx", feed, runs, threads)
        yield name, f"ONNX Runtime on the CPU ({threads} threads): a reference, no TensorRT figure", rows


def _native(source: Any, names: list[str], args: argparse.Namespace) -> Iterator[Profile]:
    from longtake.commands.probes import trtexec_path
    from longtake.runtime.profile.gpu import backend_profile
    from longtake.runtime.sources import backend_from_source

    trtexec = None if args.without_trtexec else trtexec_path()
    if trtexec:
        yield from ((plan.stem, "trtexec", trtexec_profile(trtexec, plan, args.runs)) for plan in plain_plans(source))
    backend: Any = backend_from_source(source, args.backend, None)
    try:
        for name in names:
            yield name, f"TensorRT from Python, {source.recipe.mode}", backend_profile(backend, name, args.runs)
    finally:
        backend.close()


def plain_plans(source: Any) -> list[Path]:
    """The plans that trtexec can load: verified against their manifests, and without our plugins."""
    from longtake.formats.plan import verify_plan
    from longtake.machine.flavour import flavour_here, gpu_compute_capability

    flavour, machine = flavour_here(), gpu_compute_capability()
    plans = sorted(source.engines.glob("*.plan"))
    return [plan for plan in plans if not verify_plan(plan, flavour, machine).plugins]
