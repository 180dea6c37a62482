"""What is measured, by the names that a scrape shows; prometheus_client's registry, or Ray's own metrics, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from longtake.formats.model_name import parts_of_full
from longtake.version import __version__

PREFIX = "longtake_"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 60.0)
COUNTERS: dict[str, tuple[str, ...]] = {
    "frames_generated": (),
    "client_stall_seconds": (),
    "session_moves": ("reason",),
    "journal_bytes": (),
    "errors": ("code",),
    "http_requests": ("route", "method", "status"),
}
GAUGES: dict[str, tuple[str, ...]] = {
    "sessions": ("state",),
    "queue_length": (),
    "realtime_factor": (),
    "ahead_chunks": (),
    "websockets": (),
    "worker_up": (),
    "worker_info": ("recipe", "backend", "gpu", "version"),
    "gpu_memory_bytes": ("kind",),
}
HISTOGRAMS: dict[str, tuple[str, ...]] = {
    "queue_wait_seconds": (),
    "first_chunk_seconds": (),
    "chunk_seconds": ("stage",),
    "interaction_seconds": (),
    "replay_seconds": (),
    "http_request_seconds": ("route",),
}
STAGES = ("denoise", "clean", "decode", "encode")


class Metric(Protocol):
    """One metric; `labels` are the values of its labels."""

    def add(self, value: float, labels: Mapping[str, str]) -> None: ...
    def set(self, value: float, labels: Mapping[str, str]) -> None: ...
    def observe(self, value: float, labels: Mapping[str, str]) -> None: ...


class Meters:
    """Named metrics. `make`: (kind, name, label names) to a metric; kind is "counter", "gauge" or "histogram"."""

    def __init__(self, make: Callable[[str, str, tuple[str, ...]], Metric], text: Callable[[], bytes] = bytes) -> None:
        """`text`: what a scrape shows."""
        kinds = (("counter", COUNTERS), ("gauge", GAUGES), ("histogram", HISTOGRAMS))
        self._metrics = {
            name: make(kind, PREFIX + name, labels) for kind, names in kinds for name, labels in names.items()
        }
        self.text = text

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._metrics[name].add(value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].set(value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].observe(value, labels)

    def worker(self, about: Mapping[str, Any], used: int) -> None:
        """A worker is there. about: of `describe.description`; used: bytes of its memory."""
        facts = {"backend": about["backend"], "gpu": str(about["gpu"] or "none"), "version": __version__}
        self.set("worker_info", 1, recipe=parts_of_full(about["model"])[1], **facts)
        self.set("gpu_memory_bytes", float(about["budget_bytes"] or 0), kind="budget")
        self.set("gpu_memory_bytes", float(used), kind="used")

    def chunk(self, ms: Mapping[str, float], frames: int, seconds: float, fps: int, size: int) -> None:
        """A chunk was made: milliseconds by stage, from its beginning to the journal `seconds`, `size` bytes kept."""
        for stage in STAGES:
            if stage in ms:
                self.observe("chunk_seconds", ms[stage] / 1e3, stage=stage)
        self.observe("chunk_seconds", seconds, stage="total")
        self.add("frames_generated", frames)
        self.add("journal_bytes", size)
        self.set("realtime_factor", frames / fps / max(seconds, 1e-6))


class _Silent:
    def add(self, value: float, labels: Mapping[str, str]) -> None: ...
    def set(self, value: float, labels: Mapping[str, str]) -> None: ...
    def observe(self, value: float, labels: Mapping[str, str]) -> None: ...


def silent() -> Meters:
    """Metrics that nobody reads."""
    return Meters(lambda kind, name, labels: _Silent())


class _Prometheus:
    def __init__(self, metric: Any, labelled: bool) -> None:
        self._metric, self._labelled = metric, labelled

    def _of(self, labels: Mapping[str, str]) -> Any:
        return self._metric.labels(**labels) if self._labelled else self._metric

    def add(self, value: float, labels: Mapping[str, str]) -> None:
        self._of(labels).inc(value)

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        self._of(labels).set(value)

    def observe(self, value: float, labels: Mapping[str, str]) -> None:
        self._of(labels).observe(value)


def prometheus() -> Meters:
    """Metrics of this process in a registry of their own."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

    registry = CollectorRegistry()

    def make(kind: str, name: str, labels: tuple[str, ...]) -> Metric:
        text = name.removeprefix(PREFIX).replace("_", " ")
        if kind == "histogram":
            return _Prometheus(Histogram(name, text, labels, buckets=SECONDS, registry=registry), bool(labels))
        made = {"counter": Counter, "gauge": Gauge}[kind](name, text, labels, registry=registry)
        return _Prometheus(made, bool(labels))

    return Meters(make, lambda: generate_latest(registry))


class _RayMetric:
    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def add(self, value: float, labels: Mapping[str, str]) -> None:
        if value > 0:  # Ray refuses 0
            self._metric.inc(value, dict(labels))

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        self._metric.set(value, dict(labels))

    def observe(self, value: float, labels: Mapping[str, str]) -> None:
        self._metric.observe(value, dict(labels))


def ray_meters(metrics: Any) -> Meters:
    """Metrics that Ray exports on each node's own port. metrics: `ray.util.metrics`."""

    def make(kind: str, name: str, labels: tuple[str, ...]) -> Metric:
        if kind == "histogram":
            return _RayMetric(metrics.Histogram(name, name, boundaries=list(SECONDS), tag_keys=labels))
        return _RayMetric({"counter": metrics.Counter, "gauge": metrics.Gauge}[kind](name, name, tag_keys=labels))

    return Meters(make)
