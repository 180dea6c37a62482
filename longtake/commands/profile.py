"""`longtake profile`: where the time goes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from longtake.files import write_json
from longtake.machine.capability import BACKENDS
from longtake.options import Bounds, Command, OneOf, check, option
from longtake.runtime.profile.profile import reference_profile, table, timing_feed, trtexec_profile
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import NETWORKS

OUT = Path("runs") / "profile"
Profile = tuple[str, str, list[dict[str, Any]]]  # network or plan, who measured it, rows


@dataclass(frozen=True)
class ProfileOptions:
    """What"""

    engines: str | None = option(None, metavar="FOLDER")
    """engines, exported networks, or a recipe's name (default: the best there is)"""
    network: Annotated[tuple[str, ...], OneOf(NETWORKS)] = option((), repeated=True)
    """this network; may be repeated (default: all)"""
    backend: Annotated[str, OneOf(("auto", *BACKENDS))] = option("auto")
    """auto: the one that fits"""
    runs: Annotated[int, Bounds(1, name="number of runs")] = option(10, metavar="N")
    """runs that are averaged"""
    top: int = option(12, metavar="N")
    """layers shown a network"""
    without_trtexec: bool = option(False)
    """profile from Python even if trtexec is there"""
    out: Path = option(OUT, metavar="FOLDER")
    """where the JSON files are written"""

    def __post_init__(self) -> None:
        check(self)


def run(options: ProfileOptions) -> int:
    """Profile each network, print its table, write its JSON."""
    from longtake.runtime.sources import choose_backend, source_from_name

    source = source_from_name(options.engines)
    choice = choose_backend(source, options.backend)
    print(f"backend {choice.backend}: {choice.reason}")
    preset = source.recipe.model
    names = list(options.network or family_of(preset).networks(preset))
    profiles = (
        _reference(source, names, options.runs) if choice.backend == "reference" else _native(source, names, options)
    )
    for name, measured_by, rows in profiles:
        path = options.out / source.recipe.name / f"{name}.json"
        write_json(path, rows)
        print(f"\n{name}, {measured_by} ({path}):")
        print("\n".join(table(rows, options.top)))
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


def _native(source: Any, names: list[str], options: ProfileOptions) -> Iterator[Profile]:
    from longtake.commands.probes import trtexec_path
    from longtake.runtime.profile.gpu import backend_profile
    from longtake.runtime.sources import backend_from_source

    trtexec = None if options.without_trtexec else trtexec_path()
    if trtexec:
        yield from (
            (plan.stem, "trtexec", trtexec_profile(trtexec, plan, options.runs)) for plan in plain_plans(source)
        )
    backend: Any = backend_from_source(source, options.backend, None)
    try:
        for name in names:
            yield name, f"TensorRT from Python, {source.recipe.mode}", backend_profile(backend, name, options.runs)
    finally:
        backend.close()


def plain_plans(source: Any) -> list[Path]:
    """The plans that trtexec can load: verified against their manifests, and without our plugins."""
    from longtake.formats.plan import verify_plan
    from longtake.machine.flavour import flavour_here, gpu_compute_capability

    flavour, machine = flavour_here(), gpu_compute_capability()
    plans = sorted(source.engines.glob("*.plan"))
    return [plan for plan in plans if not verify_plan(plan, flavour, machine).plugins]


COMMAND = Command(
    run,
    (ProfileOptions,),
    "Per-layer times: through trtexec where it is installed (plans without plugins), else through "
    "TensorRT's profiler or CUDA events; without a GPU, ONNX Runtime's on the CPU, which are no TensorRT figures.",
)
