"""Traces: what a collector would get, by OpenTelemetry's own exporter into memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import PROMPT, Live, Served

from longtake.errors import UnavailableError
from longtake.runtime.serve.front import Front
from longtake.runtime.serve.server import Settings
from longtake.runtime.serve.traces import Traces, traces_to

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_without_an_address_nothing_is_imported() -> None:
    code = "import sys; from longtake.runtime.serve.server import Settings, traces_to; traces_to(None)\n"
    code += "raise SystemExit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing can be found
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UnavailableError, match="OpenTelemetry") as error:
        traces_to("http://127.0.0.1:4318/v1/traces")
    assert error.value.fix == "pip install 'longtake[otel]'"


def test_a_span_a_session_a_chunk_and_a_stage(make_toy: Any, make_generator: Any, tmp_path: Path) -> None:
    sdk = pytest.importorskip(
        "opentelemetry.sdk.trace", reason="OpenTelemetry is not installed: pip install 'longtake[otel]'"
    )
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))

    class Traced(Settings):
        def front(self, *words: Any) -> Front:
            front = super().front(*words)
            front.traces = Traces(provider)
            return front

    server = Served(lambda: make_generator(make_toy()), tmp_path, Traced(store=tmp_path))
    live = Live(server.host, headers={"traceparent": CALLER}, prompt=PROMPT, chunks=3)
    ident = live.until("session.done")["session_id"]
    live.close()
    job = server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "1"}).json()["id"]
    server.wait_for(job)
    server.end()
    spans = memory.get_finished_spans()
    by_id = {span.context.span_id: span for span in spans}
    sessions = {span.attributes["session"]: span for span in spans if span.name == "session"}
    assert sessions[ident].context.trace_id == int(CALLER.split("-")[1], 16)
    assert sessions[ident].parent.span_id == int(CALLER.split("-")[2], 16)
    assert sessions[job].parent is None and sessions[job].attributes["kind"] == "video"
    chunks = [span for span in spans if span.name == "chunk"]
    assert [span.attributes["chunk"] for span in chunks if span.parent.span_id == sessions[ident].context.span_id] == [
        0,
        1,
        2,
    ]
    assert sum(span.parent.span_id == sessions[job].context.span_id for span in chunks) == 1
    stages = [span for span in spans if span.name in ("denoise", "clean", "decode", "encode")]
    assert len(stages) == 4 * 4 and {by_id[stage.parent.span_id].name for stage in stages} == {"chunk"}
    assert all(span.start_time <= span.end_time for span in spans) and PROMPT not in repr(
        [span.attributes for span in spans]
    )
