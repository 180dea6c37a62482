"""What one server grants: sizes, rates, counts and times, all in one place; each is an option of `longtake serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from longtake.options import Bounds, check, option

KIB, MIB, GB = 1 << 10, 1 << 20, 10**9


@dataclass(frozen=True)
class Limits:
    """What is granted"""

    prompt_bytes: Annotated[int, Bounds(1)] = option(8 * KIB)
    """bytes of a prompt or negative prompt"""
    story_bytes: Annotated[int, Bounds(1)] = option(64 * KIB)
    """bytes of a story"""
    story_segments: Annotated[int, Bounds(1)] = option(256)
    """segments of a story"""
    first_message_bytes: Annotated[int, Bounds(1024)] = option(12 * MIB)
    """bytes of a socket's first message, which may hold a picture"""
    message_bytes: Annotated[int, Bounds(1024)] = option(64 * KIB)
    """bytes of every later message"""
    messages_per_second: Annotated[float, Bounds(0.1)] = option(10.0)
    """messages a second that a socket may send on average"""
    message_burst: Annotated[int, Bounds(1)] = option(20)
    """messages that may come at once"""
    inline_image_bytes: Annotated[int, Bounds(1)] = option(8 * MIB)
    """bytes of a picture inside a message"""
    image_bytes: Annotated[int, Bounds(1)] = option(16 * MIB)
    """bytes of an uploaded picture"""
    image_side: Annotated[int, Bounds(16)] = option(4096)
    """pixels a side of a picture, read from its header before it is decoded"""
    clip_bytes: Annotated[int, Bounds(1)] = option(256 * MIB)
    """bytes of an uploaded clip"""
    clip_seconds: Annotated[float, Bounds(0.1)] = option(60.0)
    """seconds of an uploaded clip"""
    session_chunks: Annotated[int, Bounds(1)] = option(512)
    """chunks of a live session"""
    job_chunks: Annotated[int, Bounds(1)] = option(512)
    """chunks of a job"""
    user_sessions: Annotated[int, Bounds(1)] = option(1)
    """live sessions of one user at a time"""
    user_sockets: Annotated[int, Bounds(1)] = option(8)
    """sockets that one user may have open at one front beside those of his live sessions; one more gets no handshake"""
    user_jobs: Annotated[int, Bounds(1)] = option(4)
    """jobs of one user that wait or run"""
    user_bytes: Annotated[int, Bounds(1)] = option(20 * GB)
    """bytes that one user's sessions take on disk"""
    queue: Annotated[int, Bounds(1)] = option(64)
    """sessions and jobs that wait; one more is refused"""
    window: Annotated[int, Bounds(1, 64)] = option(8)
    """the largest window of chunks ahead of what is shown"""
    paused_s: Annotated[float, Bounds(1)] = option(600.0)
    """seconds that a paused session keeps its place on the GPU"""
    parked_s: Annotated[float, Bounds(1)] = option(86400.0)
    """seconds that a session without a viewer is kept"""
    kept_s: Annotated[float, Bounds(1)] = option(604800.0)
    """seconds that a job is kept after its end; then its record goes together with its files"""
    first_message_s: Annotated[float, Bounds(0.1)] = option(10.0)
    """seconds in which a socket's first message must come"""
    idle_s: Annotated[float, Bounds(0.1)] = option(60.0)
    """seconds without an acknowledgement or ping after which a session is parked"""
    grace_s: Annotated[float, Bounds(0)] = option(30.0)
    """seconds that a session whose socket is gone stays on the GPU if nobody waits"""

    def __post_init__(self) -> None:
        """Raise LongtakeError for what is out of bounds."""
        check(self)


NO_BODY_BYTES = 1 * MIB  # of a request that carries no file
FRAME_BYTES = 16 * MIB  # of one WebSocket frame: the server's own limit
