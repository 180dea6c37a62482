"""One plan: parse an ONNX model, compare what TensorRT made of it with the spec, compile."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from longtake.dtypes import BY_TRT
from longtake.engines.channels_last import set_format
from longtake.engines.progress import BuildProgress
from longtake.errors import IntegrityError, LongtakeError
from longtake.files import atomic_path
from longtake.machine.flavour import Flavour
from longtake.machine.trt_log import Messages, forget_scratch
from longtake.plugins.adapter import op_of_layer, register_plugins
from longtake.plugins.registry import op_named
from longtake.settings import settings_from_environment

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
            if timings is not None:
                with atomic_path(timings) as partial:
                    partial.write_bytes(bytes(config.get_timing_cache().serialize()))
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


def _check_bindings(job: PlanJob, kind: str, tensors: list[Any]) -> None:
    names = {key: dtype.name for key, dtype in BY_TRT.items()}
    parsed = {t.name: (names.get(t.dtype.name, t.dtype.name), [int(size) for size in t.shape]) for t in tensors}
    wanted = {n: (dtype, [-1 if isinstance(d, str) else d for d in shape]) for n, dtype, shape in job.spec[kind]}
    for name in wanted.keys() & set(job.channels_last):
        dtype, shape = wanted[name]
        wanted[name] = (dtype, [1, shape[3], *shape[:3]] if len(shape) == 4 else shape)
    for name in (*wanted, *parsed):
        if parsed.get(name) != wanted.get(name):
            raise IntegrityError(
                f"{job.name}: {kind} differ from the engine spec",
                got=f"{name} {parsed.get(name, 'missing')}",
                expected=f"{name} {wanted.get(name, 'absent')}",
                fix="export again: longtake export --force",
            )


def _check_aliases(job: PlanJob, plugins: list[tuple[str, Any]]) -> None:
    """An output aliases an input if its plugin writes it in place over that very network input."""
    in_place = set()
    for op, layer in plugins:
        aliases = op_named(op).spec.aliases
        in_place |= {(layer.get_output(out).name, layer.get_input(source).name) for out, source in aliases}
    wanted = {(output, source) for output, source in job.spec["aliases"]}
    if in_place != wanted:
        raise IntegrityError(
            f"{job.name}: in-place outputs differ from the engine spec",
            got=sorted(in_place - wanted)[:3] or "some missing",
            expected=sorted(wanted - in_place)[:3] or f"{len(wanted)} aliases",
        )
