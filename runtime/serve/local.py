"""Workers in this process: the front calls them directly."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from longtake.runtime.serve.grants import Ack, Change, ElsewhereError, Event, Grant
from longtake.runtime.serve.worker import Worker


class LocalWorkers:
    """See `Workers`. There is one worker, once its model is open."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def _worker(self, grant: Grant) -> Worker:
        if self.worker is None or self.worker.name != grant.worker:
            raise ElsewhereError(grant.worker)
        return self.worker

    async def stream(self, grant: Grant, window: int | None) -> AsyncGenerator[Event]:
        async with aclosing(self._worker(grant).stream(grant, window)) as events:
            async for event in events:
                yield event

    async def interact(self, grant: Grant, change: Change) -> Ack:
        return await self._worker(grant).interact(grant, change)

    async def control(self, grant: Grant, what: str) -> dict[str, Any]:
        return await self._worker(grant).control(grant, what)

    async def advance(self, grant: Grant, shown: int) -> None:
        await self._worker(grant).advance(grant, shown)
