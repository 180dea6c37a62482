"""A session whose viewer is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time

from longtake.runtime.serve.controls import Shown
from longtake.runtime.serve.registry import PARKED


async def linger(shown: Shown, driving: asyncio.Task[None]) -> None:
    """Let a session keep its place for a while, so that a reload is quick, unless somebody waits; then park it."""
    assert shown.journal is not None
    front, until = shown.front, time.monotonic() + shown.front.limits.grace_s
    try:
        if shown.grant is None or shown.ended is not None:
            return
        with contextlib.suppress(Exception):  # it may be moving, or over: then there is nothing to hold
            await front.workers.control(shown.grant, "pause")
            await front.desk.set_state(shown.journal.id, shown.grant.epoch, PARKED)
        while time.monotonic() < until and not shown.ended and not driving.done():
            if front.leaving or await front.desk.someone_waits():
                break
            await asyncio.sleep(0.1)
        with contextlib.suppress(Exception):
            await front.workers.control(shown.grant, "park")
        for _ in range(600):
            if shown.ended or driving.done():
                break
            await asyncio.sleep(0.05)
    finally:
        driving.cancel()
        await asyncio.gather(driving, return_exceptions=True)
