"""ONNX to plans for one recipe: fused engines with plugins inside, or segments with weights as inputs."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from longtake.dtypes import BY_TRT
from longtake.engines.channels_last import inner_videos, set_format, with_channels_last
from longtake.engines.precheck import require_resources
from longtake.engines.progress import BuildProgress, Interrupts
from longtake.engines.segment import segments_from_onnx
from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.files import atomic_path
from longtake.formats.onnx_file import onnx_digest, read_onnx
from longtake.formats.plan import PlanManifest, manifest_path, plugin_identities, verify_plan
from longtake.formats.recipe import Recipe
from longtake.formats.segmented_graph import Segment, segment_spec
from longtake.machine.capability import RTX_TARGETS, lookup
from longtake.machine.flavour import Flavour
from longtake.machine.trt_log import Messages, forget_scratch, scratch_of_last_build
from longtake.plugins.adapter import op_of_layer, register_plugins
from longtake.plugins.registry import op_named
from longtake.plugins.spec import DOMAIN
from longtake.settings import settings_from_environment
from longtake.training.models.families import family_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanJob:
    """One plan to build. source: an ONNX file, or a segment's model. plugins: how often each op must be a plugin.
    channels_last: bindings that the plan has as [1, C, T, Y, X] in that layout (see channels_last.py): the same bytes.
    """

    name: str
    source: Path | onnx.ModelProto
    onnx_sha256: str
    spec: dict[str, Any]
    plugins: Counter[str] = field(default_factory=Counter)
    channels_last: tuple[str, ...] = ()


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
    inside: Collection[str] = (),
    channels_last: bool = True,
) -> list[PlanResult]:
    """Build every plan of `recipe` into `out`; plans that are up to date are left alone.

    Args:
        inside: networks of a segmented recipe that are built in one piece, weights inside; without custom ops only.
        channels_last: have video streams between segments in the layout of convolutions, not transposed by each plan.

    Raises:
        UnavailableError: this machine cannot build it, or lacks memory or disk for it.
        LongtakeError: an ONNX file is missing, does not parse, or does not match the spec.
    """
    require_buildable(recipe, flavour, machine)
    names = family_of(recipe.model).networks(recipe.model)
    jobs = [
        job
        for name in names
        for job in _jobs_of(recipe, name, onnx_folder / f"{name}.onnx", out, inside, channels_last)
    ]
    require_resources(recipe, [job.source for job in jobs], out)
    return [_built(job, recipe, out, flavour, show_progress) for job in jobs]


def _jobs_of(
    recipe: Recipe, network: str, path: Path, out: Path, inside: Collection[str], channels_last: bool = True
) -> list[PlanJob]:
    """The plans of one network. A segmented recipe's networks are cut, those without custom ops into one segment: their
    weights go from the exported file to the device, and no plan holds them."""
    model = read_onnx(path, "small")
    ops = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)
    segments = out / f"{network}.segments.json"
    if recipe.mode == "fused" or (network in inside and not ops):
        segments.unlink(missing_ok=True)  # of an earlier, segmented build: where one lies, the network is run cut
        spec = family_of(recipe.model).spec(recipe.model, recipe, network).as_json()
        return [PlanJob(network, path, onnx_digest(path), spec, ops)]
    cut = segments_from_onnx(model, network)
    cut.graph.write(segments)
    jobs = []
    for segment in cut.graph.segments:
        model, names = cut.models[segment.name], tuple[str, ...]()
        if channels_last and recipe.vae_ops == "library" and network.startswith("vae"):
            model, names = with_channels_last(model, inner_videos(cut.graph, segment.name))
        jobs.append(_segment_job(segment, model, names))
    return jobs


def _segment_job(segment: Segment, model: onnx.ModelProto, channels_last: tuple[str, ...] = ()) -> PlanJob:
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


def engine_from_onnx(job: PlanJob, target: str, flavour: Flavour, show_progress: bool = True) -> tuple[bytes, int]:
    """Parse and compile one plan. Returns its bytes and the number of layers parsed."""
    trt = flavour.module
    if job.plugins:
        register_plugins(trt)
    logger = Messages(trt)
    builder = trt.Builder(logger.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger.logger)
    _parse(parser, job, logger)
    check_network(trt, network, job)
    set_format(trt, network, job.channels_last)
    plan = None
    forget_scratch()
    for named in _targets(trt, target, flavour):
        config = _config(trt, builder, job)
        if named is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(named, 0)
        timings = _timing_cache(config, flavour)
        progress = BuildProgress(trt, job.name, show_progress)
        config.progress_monitor = progress.monitor
        try:
            plan = builder.build_serialized_network(network, config)
        finally:
            progress.finish()
        if plan is not None:
            _keep_timings(config, timings)
            break
        log.info("%s: no plan for target %s: %s", job.name, named or "default", logger.last_errors())
    if plan is None:
        raise LongtakeError(
            f"{flavour.label} could not build {job.name}", got=logger.last_errors(), expected=f"a plan for {target}"
        )
    return bytes(plan), network.num_layers


def _parse(parser: Any, job: PlanJob, logger: Messages) -> None:
    if isinstance(job.source, Path):
        parsed = parser.parse_from_file(str(job.source))
    else:
        parsed = parser.parse(job.source.SerializeToString(deterministic=True))
    if not parsed:
        found = (parser.get_error(i) for i in range(min(3, parser.num_errors)))
        errors = "; ".join(f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in found)
        raise LongtakeError(f"TensorRT's ONNX parser refuses {job.name}", got=errors or logger.last_errors())


def _config(trt: Any, builder: Any, job: PlanJob) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.spec["aliases"]:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    sizes = {name: limits for name, limits in job.spec["profile"]}
    profile = builder.create_optimization_profile()
    for name, _, shape in job.spec["inputs"]:
        if any(isinstance(size, str) for size in shape):
            profile.set_shape(name, *(tuple(sizes[d][i] if isinstance(d, str) else d for d in shape) for i in range(3)))
    if sizes:
        config.add_optimization_profile(profile)
    return config


def _targets(trt: Any, target: str, flavour: Flavour) -> list[Any]:
    """What to build for, in order of preference; None leaves it to the builder.

    TensorRT-RTX has no name for 9.0: there it is the GPU here, or else the default targets, which 1.6.1 runs on 9.0.
    """
    if flavour.name != "tensorrt_rtx":
        return [None]
    named = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", None)
    return [trt.ComputeCapability.CURRENT, None] if named is None else [named]


def _timing_cache(config: Any, flavour: Flavour) -> Path | None:
    """Give `tensorrt` the kernel timings of earlier builds; TensorRT-RTX times nothing when it builds."""
    if flavour.name != "tensorrt":
        return None
    path = settings_from_environment().cache_dir / f"timing-{flavour.version}.cache"
    config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
    return path


def _keep_timings(config: Any, path: Path | None) -> None:
    if path is not None:
        with atomic_path(path) as partial:
            partial.write_bytes(bytes(config.get_timing_cache().serialize()))


def check_network(trt: Any, network: Any, job: PlanJob) -> None:
    """Compare the parsed network with the spec: bindings, plugin layers, aliases.

    Raises:
        IntegrityError: something differs; an op that is no plugin was silently inlined by the parser.
    """
    for kind, count, get in (
        ("inputs", network.num_inputs, network.get_input),
        ("outputs", network.num_outputs, network.get_output),
    ):
        _check_bindings(job, kind, [get(i) for i in range(count)])
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = [(op_of_layer(trt, layer), layer) for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    counts = Counter(op for op, _ in plugins)
    if counts != job.plugins:
        raise IntegrityError(
            f"{job.name}: custom ops did not become plugins",
            got=f"{counts.total()} PLUGIN_V3 layers: {dict(counts)}",
            expected=f"{job.plugins.total()}: {dict(job.plugins)}",
            fix="register plugins of the ONNX nodes' plugin_namespace and plugin_version; without them ops are inlined",
        )
    _check_aliases(job, plugins)


def _dtype_name(tensor: Any) -> str:
    name = tensor.dtype.name
    return BY_TRT[name].name if name in BY_TRT else name


def _check_bindings(job: PlanJob, kind: str, tensors: list[Any]) -> None:
    found = {t.name: (_dtype_name(t), _shape(t.shape)) for t in tensors}
    wanted = {n: (dtype, [-1 if isinstance(d, str) else d for d in shape]) for n, dtype, shape in job.spec[kind]}
    for name in wanted.keys() & set(job.channels_last):
        dtype, shape = wanted[name]
        wanted[name] = (dtype, [1, shape[3], *shape[:3]] if len(shape) == 4 else shape)
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise IntegrityError(
                f"{job.name}: {kind} differ from the engine spec",
                got=f"{name} {found.get(name, 'missing')}",
                expected=f"{name} {wanted.get(name, 'absent')}",
                fix="export again: longtake export --force",
            )


def _shape(dims: Any) -> list[int]:
    return [int(size) for size in dims]


def _check_aliases(job: PlanJob, plugins: list[tuple[str, Any]]) -> None:
    """An output aliases an input if its plugin writes it in place over that very network input."""
    found = set()
    for op, layer in plugins:
        aliases = op_named(op).spec.aliases
        found |= {(layer.get_output(out).name, layer.get_input(source).name) for out, source in aliases}
    wanted = {(output, source) for output, source in job.spec["aliases"]}
    if found != wanted:
        raise IntegrityError(
            f"{job.name}: in-place outputs differ from the engine spec",
            got=sorted(found - wanted)[:3] or "some missing",
            expected=sorted(wanted - found)[:3] or f"{len(wanted)} aliases",
        )
