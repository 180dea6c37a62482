"""From a chunk to the journal: wait for its frames, encode them, keep all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longtake.runtime.chunk import Chunk
from longtake.runtime.serve.fragments import Codec, fragment
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.live import Live
from longtake.runtime.story import frame_count
from longtake.training.models.presets import Preset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """ms: milliseconds by stage. bytes: on disk."""

    frames: int
    bytes: int
    ms: dict[str, float]


def is_decoded(live: Live, chunk: Chunk) -> bool:
    """Whether a chunk's frames are there. The session goes back to before one that could not be decoded, and tries again."""
    try:
        return bool(len(chunk.frames))
    except Exception as error:
        if live.failed_at is None:
            log.warning("session %s: chunk %d is made again: %s", live.grant.session, chunk.index, error)
            live.failed_at = chunk.index
        elif chunk.index <= live.failed_at:
            raise
        return False  # those after it share its fate


def keep_chunk(journal: Journal, preset: Preset, chunk: Chunk, position: dict[str, Any]) -> Kept:
    """Encode a chunk and put it into the journal. position: where the session stands after it.

    Raises:
        LeaseLostError, OSError: see `Journal.commit`.
    """
    frames, meta = chunk.frames, journal.meta
    shown_from = int(meta.about.get("first_media", 0))
    first = frame_count(preset, chunk.index) if chunk.index else 0
    first -= frame_count(preset, shown_from) if shown_from else 0
    events = journal.events()
    limit = None if any(event["type"] == "extend" for event in events) else meta.frames
    count = len(frames) if limit is None else min(len(frames), limit - first)
    began = time.perf_counter()
    codec = Codec(meta.codec, meta.encoder, meta.width, meta.height, meta.fps)
    made = fragment(frames[:count], first, chunk.index - shown_from, codec)
    ms = {**chunk.timings, "encode": 1e3 * (time.perf_counter() - began)}
    ms = {name: round(value, 1) for name, value in ms.items()}
    about = {
        "position": position,
        "prompt": chunk.prompt,
        "cut": chunk.cut,
        "shot": chunk.shot,
        "first_frame": first,
        "frames": count,
        "whole_frames": len(frames),
        "visible": list(chunk.visible),
        "ms": ms,
        "encoder": made.encoder,
        "mime": made.mime,
        **_event_ids(events, chunk.index),
    }
    return Kept(count, journal.commit(chunk.index, about, chunk.latents, made.init, made.media), ms)


def _event_ids(events: list[dict[str, Any]], chunk: int) -> dict[str, list[str]]:
    """Which changes begin with a chunk, which shape it, which are over."""
    changes = [event for event in events if event["type"] == "change" and event["at_chunk"] <= chunk]
    started = [event for event in changes if event["at_chunk"] == chunk]
    active = _shaping(changes, chunk)
    over = [event for event in (*_shaping(changes, chunk - 1), *started) if event not in active]
    told = {"started_event_ids": started, "active_event_ids": active, "completed_event_ids": over}
    return {name: [str(event["event_id"]) for event in those] for name, those in told.items()}


def _shaping(changes: list[dict[str, Any]], chunk: int) -> list[dict[str, Any]]:
    """The newest change of what is seen, and of how the camera moves: one of them ends none of the other. A way to a place
    ends with the chunk in which it begins."""

    def newest(of: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
        those = [event for event in changes if event["at_chunk"] <= chunk and of(event)]
        return [event for event in those if event["at_chunk"] == those[-1]["at_chunk"]]

    scene = newest(lambda event: event["prompt"] is not None or event["cut"])
    moves = [event for event in newest(lambda event: event.get("camera")) if "velocity" in event["camera"]]
    return [*scene, *(event for event in moves if event not in scene)]
