"""What the first message of a socket opens: a new session, one that goes on, or a new take of one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from longtake.errors import IntegrityError, LongtakeError
from longtake.runtime.serve.contract import (
    Body,
    FlowBody,
    Resume,
    Retake,
    RetakeBody,
    ServeError,
    Start,
    damaged_video,
    refused,
)
from longtake.runtime.serve.flow import Flow, flow_for
from longtake.runtime.serve.fork import Wish, fork
from longtake.runtime.serve.front import Front, writing
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.registry import FAILED
from longtake.runtime.serve.requests import (
    Asker,
    checked_story,
    checked_text,
    described,
    image_from_url,
    view_of,
    with_image,
)
from longtake.runtime.serve.store import new_id


@dataclass(frozen=True)
class Opening:
    """next_chunk: the first one that the client lacks. new: the session was made for it."""

    journal: Journal
    flow: Flow
    next_chunk: int
    new: bool = False


async def opened(front: Front, user: str, message: Body) -> Opening:
    """The session that a first message asks for.

    Raises:
        ServeError: there is none, or it cannot be made.
    """
    if reason := await front.ready():
        code = "stopping" if front.leaving else "no_capacity"
        raise ServeError(code, reason, status=503, retry_s=5, detail={"fix": "try again in some seconds"})
    if isinstance(message, Resume):
        return _resumed(front, user, message)
    asker = Asker(user, await front.about(), front.limits, front.codec)
    await front.room_for(user)
    if isinstance(message, Retake):
        try:
            return await asyncio.to_thread(_retaken, front, asker, message)
        except IntegrityError as error:
            raise damaged_video(error) from None
    assert isinstance(message, Start)
    return await asyncio.to_thread(_begun, front, asker, message)


def _begun(front: Front, asker: Asker, message: Start) -> Opening:
    if message.format not in (None, "m4s"):
        detail = {"got": message.format[:40], "expected": "m4s", "fix": "leave format out"}
        raise ServeError("bad_format", "fragments are m4s", param="format", detail=detail)
    flow = _flow(front, message.flow, message.endless)
    ident = new_id("live")
    meta = described(message, asker, ident, "live", endless=message.endless, most=front.limits.session_chunks)
    with writing():
        if message.image_reference is not None:
            data = image_from_url(message.image_reference.image_url, front.limits)
            meta = with_image(meta, front.store.folder(ident), data, asker, "image_reference")
        return Opening(front.store.create(meta), flow, 0, new=True)


def _resumed(front: Front, user: str, message: Resume) -> Opening:
    journal = front.own(user, message.session_id)
    count = journal.count()
    if message.next_chunk > count:
        detail = {"got": str(message.next_chunk), "expected": f"at most {count}"}
        raise ServeError("bad_request", "so many chunks were never made", param="next_chunk", detail=detail)
    if journal.meta.kind != "live":
        raise ServeError("not_found", "this is a job, not a live session", status=404)
    flow = _flow(front, message.flow, journal.meta.endless)
    with writing():
        journal.touch()
        if (journal.end() or {}).get("state") == FAILED:  # it is tried again: by other engines, or after what broke it
            journal.reopen()
    return Opening(journal, flow, message.next_chunk)


def _retaken(front: Front, asker: Asker, message: Retake) -> Opening:
    source = front.own(asker.user, message.session_id)
    wish = wish_of(message, asker)
    flow = _flow(front, message.flow, source.meta.endless)
    journal = forked(front, source, asker.user, wish, "live")
    count = journal.count()
    return Opening(journal, flow, count if message.next_chunk is None else min(message.next_chunk, count), new=True)


def wish_of(message: Retake | RetakeBody, asker: Asker, **more: object) -> Wish:
    """What a retake asks for. Raises ServeError."""
    if message.prompt is not None and message.story is not None:
        raise ServeError("bad_request", "a prompt and a story were given", detail={"expected": "one of the two"})
    if message.prompt is not None:
        checked_text(message.prompt, "the prompt", asker)
    if message.cut and not asker.about["can"]["cut"]:
        raise ServeError("not_supported", "this model knows no cuts", detail={"fix": "leave cut out"})
    if message.seed is not None and not 0 <= message.seed < 1 << 63:
        raise ServeError("bad_request", "bad seed", param="seed", detail={"expected": "0 to 2^63 - 1"})
    told = checked_story(message.story, asker) if message.story is not None else None
    if view := view_of(told):
        detail = {"got": ", ".join(view), "fix": "leave them out of the story"}
        raise ServeError("not_supported", "a retake keeps its video's camera", param="story", detail=detail)
    story = told.segments if told is not None else None
    if story is not None and sum(one.chunks for one in story) > asker.limits.session_chunks:
        raise ServeError("bad_length", "the story is too long", param="story")
    return Wish(message.from_chunk, message.prompt, bool(message.cut), story, message.seed, **more)  # type: ignore[arg-type]


def forked(front: Front, source: Journal, user: str, wish: Wish, kind: str) -> Journal:
    """A new session that shares chunks of `source`. Raises ServeError, or IntegrityError if they are damaged."""
    try:
        with writing():
            return fork(front.store, source, new_id(kind), user, wish)
    except IntegrityError:
        raise
    except LongtakeError as error:
        raise refused("bad_chunk", error, param="from_chunk") from None


def _flow(front: Front, given: FlowBody | None, endless: bool) -> Flow:
    given = given or FlowBody()
    try:
        return flow_for(given.mode, given.window, front.limits.window, endless)
    except LongtakeError as error:
        raise refused("bad_flow", error, param="flow") from None
