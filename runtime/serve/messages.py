"""Messages: read from a socket, and the longer ones that the server sends, from a journal."""

from __future__ import annotations

import json
from typing import Any

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

from longtake.runtime.serve.contract import MESSAGES, Body, ServeError, parsed
from longtake.runtime.serve.flow import Flow
from longtake.runtime.serve.journal import Journal

LAST_WORDS_S = (
    0.5  # in which a client may acknowledge the last chunk: what it sends to a closed socket is an error to it
)
IDLE_CLOSE, TAKEN_OVER, UNFIT, QUOTA, BUSY = 4408, 4409, 4410, 4429, 4503
END_CODES = {
    "cannot_open": 4400,
    "engines_differ": UNFIT,
    "taken_over": TAKEN_OVER,
    "lease_lost": TAKEN_OVER,
    "store_full": BUSY,
}
OF_A_CHUNK = ("mime", "encoder", "first_frame", "prompt", "shot", "cut", "ms", "visible")
EVENT_IDS = ("started_event_ids", "active_event_ids", "completed_event_ids")


def start_facts(journal: Journal, about: dict[str, Any], flow: Flow) -> dict[str, Any]:
    """`video.start`: everything as it will really be."""
    meta = journal.meta
    config = {
        "model": meta.model,
        "width": meta.width,
        "height": meta.height,
        "fps": meta.fps,
        "num_frames": meta.frames,
        "chunks": None if meta.endless else meta.chunks,
        "endless": meta.endless,
        "seed": meta.seed,
        "num_inference_steps": meta.steps,
        "guidance_scale": meta.guidance,
        "negative_prompt": meta.negative_prompt,
        "codec": meta.codec,
        "script": [list(entry) for entry in meta.script],
        "first_chunk_frames": about["first_chunk_frames"],
        "chunk_frames": about["chunk_frames"],
        "can": about["can"],
        "flow": {"mode": flow.mode, "window": flow.window},
        "parent": meta.parent,
        "from_chunk": meta.from_chunk,
    }
    ids = {"request_id": journal.id, "session_id": journal.id}
    return {**ids, "format": "m4s", "mime": meta.about["mime"], "config": config}


def chunk_facts(journal: Journal, index: int, with_init: bool) -> tuple[dict[str, Any], bytes]:
    """`video.chunk_metadata`, and the fragment that it announces, with the init segment before it if need be."""
    about = journal.chunk(index)
    data = (journal.init() if with_init else b"") + journal.media(index)
    facts = {
        "request_id": journal.id,
        "kind": "media",
        "transport_chunk_index": index,
        "generation_chunk_index": index,
        "num_frames": about["frames"],
        "byte_length": len(data),
        **{key: about[key] for key in (*EVENT_IDS, *OF_A_CHUNK)},
    }
    return facts, data


def chunk_seconds(ms: dict[str, float]) -> float:
    """Seconds between chunks: of the slowest of the stages that work beside each other."""
    making = ms.get("conditions", 0) + ms.get("denoise", 0) + ms.get("clean", 0)
    return max(making, ms.get("decode", 0), ms.get("encode", 0)) / 1e3


async def text_of(socket: WebSocket) -> str:
    """The next message. Raises ServeError for bytes, WebSocketDisconnect at the end."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    if message.get("text") is None:
        raise ServeError("bad_request", "messages are text", close=4400)
    return str(message["text"])


def message_of(text: str, most: int) -> Body:
    """A message of at most `most` bytes.

    Raises:
        ServeError: it is no message; with a close code where it is not even JSON.
    """
    if len(text) > most or len(text.encode("utf-8", "surrogatepass")) > most:
        detail = {"expected": f"at most {most} bytes"}
        raise ServeError("too_large", "the message is too large", close=4400, detail=detail)
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise ServeError("bad_request", "this is no JSON", close=4400) from None
    named = given.get("type") if isinstance(given, dict) else None
    kind = MESSAGES.get(named) if isinstance(named, str) else None
    if kind is None:
        got = str(named)[:100] if isinstance(given, dict) else type(given).__name__
        raise ServeError("unknown_type", "unknown message", detail={"got": got, "expected": ", ".join(MESSAGES)})
    return parsed(kind, given)
