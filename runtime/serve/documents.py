"""The interfaces as documents: OpenAPI of the routes, AsyncAPI of the socket. A test compares them with docs/serving."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

from longtake.runtime.serve.app import app_from
from longtake.runtime.serve.auth import Door
from longtake.runtime.serve.contract import MESSAGES
from longtake.runtime.serve.front import Front
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.local import LocalWorkers
from longtake.runtime.serve.messages import EVENT_IDS
from longtake.runtime.serve.meters import silent
from longtake.runtime.serve.store import Store
from longtake.version import __version__

# What the server sends: (fields that are always there, what it means). A client ignores fields and types it does not know.
SENT: dict[str, tuple[tuple[str, ...], str]] = {
    "session.queued": (("position", "ahead", "estimate_s"), "It waits; again whenever its position changes."),
    "video.start": (
        ("request_id", "session_id", "format", "mime", "config", "estimates"),
        "Everything as it will really be.",
    ),
    "video.chunk_metadata": (
        ("request_id", "kind", "transport_chunk_index", "generation_chunk_index", "num_frames", "byte_length")
        + (*EVENT_IDS, "first_frame", "prompt", "shot", "cut", "ms", "visible"),
        "Exactly one binary frame follows: a fragment, the first of a connection with the init segment before it.",
    ),
    "session.interaction.queued": (
        ("request_id", "event_id", "at_chunk", "transition_chunks"),
        "The first chunk that a change shapes.",
    ),
    "session.moved": (("request_id", "reason", "replaying"), "Another worker goes on; nothing has to be done."),
    "session.paused": (("request_id", "chunk"), "From this chunk on."),
    "session.continued": (("request_id", "chunk"), "From this chunk on."),
    "session.extended": (("request_id", "chunks"), "Chunks in all."),
    "session.snapshot.saved": (("request_id", "snapshot_id", "chunk"), "session.resume takes the id."),
    "session.done": (("request_id", "session_id", "chunks", "stopped", "reason", "report"), "The end."),
    "session.pong": (("request_id",), "The answer to a ping."),
    "error": (("message", "code", "longtake"), "What is wrong; a close code from 4400 on follows where it is the end."),
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "session.start": {
        "prompt": "a green seven drifts left over a dark blue background, soft light",
        "num_frames": 157,
        "seed": 7,
        "flow": {"mode": "ack", "window": 2},
    },
    "session.resume": {"session_id": "live_0123456789abcdef", "next_chunk": 3, "flow": {"mode": "ack"}},
    "session.retake": {
        "session_id": "live_0123456789abcdef",
        "from_chunk": 3,
        "prompt": "a red two circles over a forest background",
    },
    "session.interaction": {
        "interaction": {
            "event_id": "e1",
            "event": {"prompt": "a red two circles over a forest background", "cut": True},
        }
    },
    "session.ack": {"chunk": 1},
    "session.playback": {"position_seconds": 2.5},
    "session.extend": {"chunks": 2},
}  # of those that have fields


def openapi() -> dict[str, Any]:
    """OpenAPI of every route."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        front = Front(store, cast(Any, None), LocalWorkers(), Limits(), silent(), Door(b""))
        return app_from(front).openapi()


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3 of the socket."""
    received = {name: _received(name) for name in MESSAGES}
    sent = {name: _sent(*about) for name, about in SENT.items()}
    channel = {"address": "/v1/realtime/video", "messages": {**received, **sent}}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "longtake live", "version": __version__},
        "channels": {"video": channel},
        "operations": {
            name: {
                "action": action,
                "channel": {"$ref": "#/channels/video"},
                "messages": [{"$ref": f"#/channels/video/messages/{each}"} for each in names],
            }
            for name, action, names in (("client", "receive", list(received)), ("server", "send", list(sent)))
        },
    }


def _received(name: str) -> dict[str, Any]:
    schema = MESSAGES[name].model_json_schema()
    schema.setdefault("required", []).append("type")
    return {"payload": schema, "examples": [{"payload": {"type": name, **EXAMPLES.get(name, {})}}]}


def _sent(fields: tuple[str, ...], summary: str) -> dict[str, Any]:
    properties: dict[str, Any] = {"type": {"type": "string"}, **{name: {} for name in fields}}
    return {"summary": summary, "payload": {"type": "object", "properties": properties, "required": ["type", *fields]}}
