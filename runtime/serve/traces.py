"""Traces by OpenTelemetry, where they are asked for: a span a session that is watched or made, in it a span a chunk, in that its
stages. OpenTelemetry is imported only then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from longtake.errors import UnavailableError
from longtake.version import __version__


class Traces:
    """provider: OpenTelemetry's TracerProvider; None traces nothing."""

    def __init__(self, provider: Any = None) -> None:
        self._tracer = None if provider is None else provider.get_tracer("longtake", __version__)

    @contextmanager
    def session(self, ident: str, kind: str, traceparent: str | None = None) -> Iterator[Any]:
        """A span for as long as this lasts; it goes on with a caller's `traceparent`. What it yields is for `chunk`."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": traceparent or ""})
        facts = {"session": ident, "kind": kind}
        with self._tracer.start_as_current_span("session", context, attributes=facts) as span:
            yield span

    def chunk(self, session: Any, index: int, seconds: float, ms: Mapping[str, float]) -> None:
        """A chunk of a session's span was kept just now, `seconds` after it was begun. Its stages are laid one after another:
        how long each waited for what was before it is not known."""
        if self._tracer is None or session is None:
            return
        from opentelemetry.trace import set_span_in_context

        end = time.time_ns()
        at = end - int(1e9 * seconds)
        whole = self._tracer.start_span(
            "chunk", set_span_in_context(session), attributes={"chunk": index}, start_time=at
        )
        for name, each in ms.items():
            stage = self._tracer.start_span(name, set_span_in_context(whole), start_time=at)
            at += int(1e6 * each)
            stage.end(at)
        whole.end(end)


def traces_to(url: str | None) -> Traces:
    """Traces that are sent to a collector by OTLP over HTTP; without an address, none.

    Raises:
        UnavailableError: OpenTelemetry is not installed.
    """
    if url is None:
        return Traces()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UnavailableError(
            "traces need OpenTelemetry", got=f"no {error.name}", fix="pip install 'longtake[otel]'"
        ) from None

    provider = TracerProvider(resource=Resource.create({"service.name": "longtake", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
    return Traces(provider)
