"""What passes between front, registry and worker: plain data, so that it may cross to another process or machine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from longtake.errors import LongtakeError


@dataclass(frozen=True)
class Grant:
    """A worker may make this session's chunks. Of two grants the one with the higher epoch counts."""

    session: str
    worker: str
    epoch: int


@dataclass(frozen=True)
class Running:
    """What a worker makes now: so that a registry that died can be filled again."""

    grant: Grant
    user: str
    kind: str


@dataclass(frozen=True)
class Event:
    """From a worker. kind: "replaying", "opened", "chunk", "end"."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A live change. camera: a way of it, as `Session.steer` takes one. extend: chunks to add instead."""

    event_id: str
    prompt: str | None = None
    cut: bool = False
    camera: dict[str, Any] | None = None
    extend: int = 0

    def as_json(self) -> dict[str, Any]:
        if self.extend:
            return {"event_id": self.event_id, "extend": self.extend}
        return {"event_id": self.event_id, "prompt": self.prompt, "cut": self.cut, "camera": self.camera}


@dataclass(frozen=True)
class Ack:
    """at_chunk: the first chunk that a change shapes; of more chunks, how many there are in all."""

    at_chunk: int


class ChangeRefusedError(Exception):
    """A change that is not taken. code: the error's, as clients see it."""

    def __init__(self, code: str, message: str, error: LongtakeError | None = None) -> None:
        super().__init__(message)
        self.code, self.message = code, message
        known = {"got": error.got, "expected": error.expected, "fix": error.fix} if error else {}
        self.detail = {key: str(value) for key, value in known.items() if value is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        """Across processes without the cause."""
        return (_refused, (self.code, self.message, self.detail))


def _refused(code: str, message: str, detail: dict[str, str]) -> ChangeRefusedError:
    error = ChangeRefusedError(code, message)
    error.detail = detail
    return error


class WorkerLostError(Exception):
    """The worker that made a session is gone."""


class ElsewhereError(WorkerLostError):
    """A call came to another worker than the one that it names."""


class Workers(Protocol):
    """How a front reaches workers, in this process or elsewhere."""

    def stream(self, grant: Grant, window: int | None) -> AsyncIterator[Event]:
        """The session's events for as long as this is iterated. Raises WorkerLostError."""
        ...

    async def interact(self, grant: Grant, change: Change) -> Ack: ...

    async def control(self, grant: Grant, what: str) -> dict[str, Any]: ...

    async def advance(self, grant: Grant, shown: int) -> None: ...
