"""A live change to a session in this worker: in the journal first, then taken, then acknowledged."""

from __future__ import annotations

import logging
from typing import Any

from longtake.errors import LongtakeError
from longtake.runtime.serve.grants import Ack, Change, ChangeRefusedError
from longtake.runtime.serve.live import Live
from longtake.runtime.serve.logs import shown
from longtake.runtime.session import Session

log = logging.getLogger(__name__)


def taken(live: Live, change: Change) -> Ack:
    """Take a change, or repeat the answer to one that was taken.

    Raises:
        ChangeRefusedError: the session cannot show it, or it cannot be kept.
    """
    with live.lock:
        known = {event["event_id"]: event for event in live.journal.events() if event.get("event_id")}
        if change.event_id in known:
            return _repeated(known[change.event_id], change)
        session = live.session
        if session is None or live.over or live.ending:
            raise ChangeRefusedError("not_active", "the session has ended")
        try:
            return _changed(live, session, change)
        except LongtakeError as error:
            raise ChangeRefusedError("interaction_failed", error.what, error) from None
        except OSError as error:
            full = LongtakeError(f"the change cannot be kept: {error.strerror}", fix="free space, then ask again")
            raise ChangeRefusedError("store_full", full.what, full) from None


def _changed(live: Live, session: Session, change: Change) -> Ack:
    if change.extend:
        return _extended(live, session, change)
    if change.prompt is None and not change.cut and change.camera is None:
        raise ChangeRefusedError("interaction_failed", "there is nothing to change")

    def record(at: int) -> None:
        live.journal.append_event({"type": "change", "at_chunk": at, **change.as_json()})

    at = session.change(change.prompt, change.cut, change.camera, record)
    about = {"prompt": shown(change.prompt), "cut": change.cut, "camera": change.camera is not None}
    log.info("change", extra={"session": live.grant.session, "chunk": at, **about})
    return Ack(at)


def _extended(live: Live, session: Session, change: Change) -> Ack:
    if session.options.endless:
        raise ChangeRefusedError("interaction_failed", "an endless session cannot be made longer")
    totals = []

    def record(total: int) -> None:  # called while no chunk can begin or end
        if not session.position.left:
            raise ChangeRefusedError("too_late", "the last chunk is there")
        live.journal.append_event({"type": "extend", "total": total, **change.as_json()})
        totals.append(total)

    session.extend(change.extend, record=record)
    return Ack(totals[0])


def _repeated(event: dict[str, Any], change: Change) -> Ack:
    """The same answer to the same change. Raises ChangeRefusedError for another one under its name."""
    if any(event.get(key) != value for key, value in change.as_json().items()):
        raise ChangeRefusedError("event_id_conflict", "this event_id was another change")
    return Ack(int(event.get("at_chunk", event.get("total", 0))))
