"""ONNX to plans for one recipe: fused engines with plugins inside, or segments with weights as inputs."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from longtake.engines.channels_last import inner_videos, with_channels_last
from longtake.engines.child import engine_from_onnx
from longtake.engines.compile import PlanJob
from longtake.engines.precheck import require_resources
from longtake.engines.progress import Interrupts
from longtake.engines.segment import segments_from_onnx
from longtake.errors import LongtakeError, UnavailableError
from longtake.files import atomic_path
from longtake.formats.onnx_file import onnx_digest, read_onnx
from longtake.formats.plan import PlanManifest, manifest_path, plugin_identities, verify_plan
from longtake.formats.recipe import Recipe
from longtake.formats.segmented_graph import Segment, segment_spec
from longtake.machine.capability import RTX_TARGETS, lookup
from longtake.machine.flavour import Flavour
from longtake.machine.trt_log import scratch_of_last_build
from longtake.plugins.spec import DOMAIN
from longtake.training.models.families import family_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanResult:
    """A built plan, or one that was up to date (`skipped`)."""

    path: Path
    manifest: PlanManifest
    skipped: bool


def require_buildable(recipe: Recipe, flavour: Flavour, machine: str | None) -> None:
    """Raise UnavailableError, before any work, if this machine cannot build `recipe`.

    Args:
        machine: compute capability of the GPU here, or None.
    """
    target = recipe.compute_capability
    ahead_of_time = flavour.name == "tensorrt_rtx" and target in RTX_TARGETS
    if not ahead_of_time and machine != target:
        raise UnavailableError(
            f"recipe {recipe.name} cannot be built on this machine",
            got=f"a GPU of compute capability {machine}" if machine else "no GPU",
            expected=f"a GPU of compute capability {target}: {flavour.label} cannot build for it ahead of time",
            fix=f"build there, or choose a recipe for {', '.join(RTX_TARGETS)}",
        )
    verdict = lookup(recipe.mode, flavour.name, flavour.version, target, recipe.precision)
    if not verdict.usable:
        raise UnavailableError(
            f"recipe {recipe.name} cannot be built with {flavour.label}",
            got=f"{recipe.precision}, {recipe.mode}, compute capability {target}",
            expected=verdict.reason,
            fix=verdict.fix or None,
        )


def build_recipe(
    recipe: Recipe,
    onnx_folder: Path,
    out: Path,
    flavour: Flavour,
    machine: str | None,
    show_progress: bool = True,
    ranks: Sequence[str] = (),
) -> list[PlanResult]:
    """Build every plan of `recipe` into `out`; plans that are up to date are left alone. ranks: networks of ranks that are
    exported there, too.

    Raises:
        UnavailableError: this machine cannot build it, or lacks memory or disk for it.
        LongtakeError: an ONNX file is missing, does not parse, or does not match the spec.
    """
    require_buildable(recipe, flavour, machine)
    names = [*family_of(recipe.model).networks(recipe.model), *ranks]
    for stale in out.glob("*_of*.segments.json"):
        if stale.name.partition(".")[0] not in ranks:
            stale.unlink()  # of an earlier export
    jobs = [job for name in names for job in _jobs_of(recipe, name, onnx_folder / f"{name}.onnx", out)]
    require_resources(recipe, [job.source for job in jobs], out)
    return [_built(job, recipe, out, flavour, show_progress) for job in jobs]


def _jobs_of(recipe: Recipe, network: str, path: Path, out: Path) -> list[PlanJob]:
    """The plans of one network. A segmented recipe's networks are cut, those without custom ops into one segment: their
    weights go from the exported file to the device, and no plan holds them."""
    model = read_onnx(path, "small")
    segments = out / f"{network}.segments.json"
    if recipe.mode == "fused":
        ops = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)
        segments.unlink(missing_ok=True)  # of an earlier, segmented build: where one lies, the network is run cut
        spec = family_of(recipe.model).spec(recipe.model, recipe, network).as_json()
        return [PlanJob(network, path, onnx_digest(path), spec, ops)]
    cut = segments_from_onnx(model, network)
    cut.graph.write(segments)
    jobs = []
    for segment in cut.graph.segments:
        model, names = cut.models[segment.name], tuple[str, ...]()
        if recipe.vae_ops == "library" and network.startswith("vae"):
            model, names = with_channels_last(model, inner_videos(cut.graph, segment.name))
        jobs.append(segment_job(segment, model, names))
    return jobs


def segment_job(segment: Segment, model: onnx.ModelProto, channels_last: tuple[str, ...] = ()) -> PlanJob:
    """The plan of a segment; channels_last: see `PlanJob`."""
    layout = repr(channels_last).encode() if channels_last else b""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True) + layout).hexdigest()
    return PlanJob(segment.name, model, digest, segment_spec(segment), channels_last=channels_last)


def _built(job: PlanJob, recipe: Recipe, out: Path, flavour: Flavour, show_progress: bool) -> PlanResult:
    plan = out / f"{job.name}.plan"
    existing = _up_to_date(plan, job, recipe, flavour)
    if existing:
        return PlanResult(plan, existing, True)
    start = time.monotonic()
    with Interrupts():
        content, layers = engine_from_onnx(job, recipe.compute_capability, flavour, show_progress)
    manifest_path(plan).unlink(missing_ok=True)  # never an old manifest beside a new plan
    with atomic_path(plan) as partial:
        partial.write_bytes(content)
    manifest = PlanManifest(
        plan.name, job.name, hashlib.sha256(content).hexdigest(), len(content), job.onnx_sha256,
        flavour.name, flavour.version, recipe.compute_capability, plugin_identities(list(job.plugins)), job.spec,
        recipe.name, recipe.preset, layers, round(time.monotonic() - start, 2), scratch_of_last_build(),
        flavour.cuda,
    )  # fmt: skip
    manifest.write(plan)
    return PlanResult(plan, manifest, False)


def _up_to_date(plan: Path, job: PlanJob, recipe: Recipe, flavour: Flavour) -> PlanManifest | None:
    try:
        manifest = verify_plan(plan, flavour, recipe.compute_capability, network=job.name, spec=job.spec)
    except LongtakeError as reason:
        log.debug("building %s: %s", plan.name, reason.what)
        return None
    return manifest if manifest.onnx_sha256 == job.onnx_sha256 else None
