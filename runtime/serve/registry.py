"""Who waits, who runs, and where: a pure state machine. It reads no clock and no disk; every method takes `now`.

Fair by user: a free place goes to whoever's user runs least here, and among those to who waits longest. Live sessions go
before jobs, and sessions that were moved, whose viewers watch already, before all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from longtake.errors import LongtakeError
from longtake.runtime.serve.grants import Grant

QUEUED, PLACING, ACTIVE, PAUSED, PARKED = "queued", "placing", "active", "paused", "parked"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
ENDED = (DONE, STOPPED, FAILED)
MIDDLE = (QUEUED, PLACING, ACTIVE, PAUSED)
TRANSITIONS: dict[str, tuple[str, ...]] = {
    QUEUED: (PLACING, PARKED, STOPPED, FAILED),
    PLACING: (ACTIVE, QUEUED, PARKED, STOPPED, FAILED, DONE),
    ACTIVE: (PAUSED, QUEUED, PARKED, DONE, STOPPED, FAILED),
    PAUSED: (ACTIVE, QUEUED, PARKED, STOPPED, FAILED),
    PARKED: (QUEUED, STOPPED, FAILED),
    DONE: (QUEUED,),  # made longer
    STOPPED: (QUEUED,),
    FAILED: (QUEUED,),
}
LATE = 15.0  # seconds without a heartbeat after which a worker counts as lost


class QuotaError(LongtakeError):
    """More than a user, or the queue, may have. code: "quota" or "queue_full"."""

    def __init__(self, code: str, what: str, *, got: object, expected: object) -> None:
        super().__init__(what, got=got, expected=expected, fix="wait for one of them to end, then try again")
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (_quota, (self.code, self.what, self.got, self.expected))


def _quota(code: str, what: str, got: object, expected: object) -> QuotaError:
    return QuotaError(code, what, got=got, expected=expected)


def checked_transition(before: str, after: str) -> str:
    """`after`, if a session may go there from `before`. Raises LongtakeError."""
    if after != before and after not in TRANSITIONS[before]:
        raise LongtakeError(
            "a session cannot do that", got=f"{before} to {after}", expected=", ".join(TRANSITIONS[before])
        )
    return after


@dataclass(frozen=True)
class Place:
    """A worker. generation: of its deployment; those of an older one than the newest get nothing new."""

    slots: int
    generation: int
    seen: float


@dataclass(frozen=True)
class Entry:
    """A session that waits or runs. kind: "live" or "video". moved: it ran before, so that it goes first. placed: when it got
    its place."""

    session: str
    user: str
    kind: str
    asked: float
    number: int
    state: str = QUEUED
    moved: bool = False
    grant: Grant | None = None
    placed: float | None = None


@dataclass(frozen=True)
class Queue:
    """Where a session waits. position: 0 is next. estimate_s: until it has a place, if places are held as long as they were;
    None before one was given back."""

    position: int
    ahead: int
    estimate_s: float | None = None


@dataclass
class Registry:
    """See above. user_sessions, user_jobs: running and waiting ones of one user. queue: waiting ones in all."""

    user_sessions: int = 1
    user_jobs: int = 4
    queue: int = 64
    workers: dict[str, Place] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    generation: int = 0
    held_s: float | None = None  # a running mean of how long a place is held
    _number: int = 0

    # ---- workers ---------------------------------------------------------------------------------------------------

    def register(self, worker: str, slots: int, generation: int, now: float) -> None:
        """A worker is there, or still there."""
        self.generation = max(self.generation, generation)
        self.workers[worker] = Place(slots, generation, now)

    def first_number(self, number: int) -> None:
        """Number entries from here on."""
        self._number = number

    def adopt(self, grant: Grant, user: str, kind: str, now: float) -> None:
        """A worker has this session, of which nothing was known: another registry granted it."""
        self.epochs[grant.session] = max(grant.epoch, self.epochs.get(grant.session, 0))
        if grant.session not in self.entries and grant.epoch == self.epochs[grant.session]:
            self._number += 1
            entry = Entry(grant.session, user, kind, now, self._number, ACTIVE, True, grant)
            self.entries[grant.session] = entry

    def heartbeat(self, worker: str, now: float) -> bool:
        """It lives. False if it is not known (any more): then it has to register."""
        if worker not in self.workers:
            return False
        self.workers[worker] = replace(self.workers[worker], seen=now)
        return True

    def lost(self, worker: str, now: float) -> list[str]:
        """A worker is gone: its sessions wait again, before all others. Returns them."""
        self.workers.pop(worker, None)
        moved = [one.session for one in self.entries.values() if one.grant and one.grant.worker == worker]
        for session in moved:
            self.again(session, now)
        return moved

    def expired(self, now: float) -> list[str]:
        """Workers that have not been heard of for too long."""
        return [name for name, place in self.workers.items() if now - place.seen > LATE]

    def stale(self, worker: str) -> bool:
        """Whether a newer deployment has begun: the worker's sessions should move."""
        return worker in self.workers and self.workers[worker].generation < self.generation

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def ask(self, user: str, session: str, kind: str, now: float, epoch: int = 0, moved: bool = False) -> Entry:
        """Ask for a place. epoch: the newest that its journal knows. Whoever had or wanted the session before has lost it.

        Raises:
            QuotaError: the user has too many, or too many wait.
        """
        if not moved:
            self._check_quota(user, session, kind)
        self._number += 1
        self.epochs[session] = max(epoch, self.epochs.get(session, 0))
        self.entries[session] = Entry(session, user, kind, now, self._number, moved=moved)
        return self.entries[session]

    def _check_quota(self, user: str, session: str, kind: str) -> None:
        most, words = (self.user_sessions, "live sessions") if kind == "live" else (self.user_jobs, "jobs")
        others = [one for one in self.entries.values() if one.session != session and one.state != PARKED]
        own = sum(one.user == user and one.kind == kind for one in others)
        if own >= most:
            raise QuotaError("quota", f"too many {words} at a time", got=own + 1, expected=f"at most {most}")
        waiting = sum(one.state == QUEUED for one in self.entries.values())
        if waiting >= self.queue:
            raise QuotaError("queue_full", "too many wait already", got=waiting + 1, expected=f"at most {self.queue}")

    def place(self, now: float) -> list[Grant]:
        """Give free places to those who wait."""
        grants = []
        while (worker := self._free_worker()) and (order := self._order()):
            entry = order[0]
            epoch = self.epochs[entry.session] = self.epochs[entry.session] + 1
            grant = Grant(entry.session, worker, epoch)
            self._set(entry.session, PLACING, grant=grant, placed=now)
            grants.append(grant)
        return grants

    def _free_worker(self) -> str | None:
        """The worker with the most free places, of the newest deployment."""
        free = {
            name: place.slots - self._running(name)
            for name, place in self.workers.items()
            if place.generation >= self.generation
        }
        best = max(free, key=lambda name: free[name], default=None)
        return best if best is not None and free[best] > 0 else None

    def _running(self, worker: str) -> int:
        return sum(one.grant is not None and one.grant.worker == worker for one in self.entries.values())

    def _order(self) -> list[Entry]:
        """Those who wait, in the order in which they would be placed: one round a user at a time."""
        running = {one.user: 0 for one in self.entries.values()}
        for one in self.entries.values():
            running[one.user] += one.grant is not None
        waiting = sorted((one for one in self.entries.values() if one.state == QUEUED), key=lambda one: one.number)
        order = [one for one in waiting if one.moved]
        rest = [one for one in waiting if not one.moved]
        for one in order:
            running[one.user] += 1
        while rest:
            first = min(rest, key=lambda one: (one.kind != "live", running[one.user], one.number))
            running[first.user] += 1
            order.append(first)
            rest.remove(first)
        return order

    def position(self, session: str) -> Queue | None:
        """Where a session waits; None if it does not."""
        order = [one.session for one in self._order()]
        if session not in order:
            return None
        position, places = order.index(session), self._places()
        known = self.held_s is not None and places
        return Queue(position, position, round((position + 1) * self.held_s / places, 1) if known else None)  # type: ignore[operator]

    def holds(self, session: str, epoch: int) -> bool:
        """Whether a lease is the newest."""
        entry = self.entries.get(session)
        return entry is not None and entry.grant is not None and entry.grant.epoch == epoch

    def state(self, session: str) -> str | None:
        entry = self.entries.get(session)
        return entry.state if entry else None

    def moves(self, session: str, state: str) -> None:
        """A running session changes its state. Raises LongtakeError for a transition that there is not."""
        self._set(session, state)

    def again(self, session: str, now: float) -> None:
        """It lost its worker: it waits again, before all others."""
        self._set(session, QUEUED, grant=None, placed=None, moved=True)

    def release(self, session: str, number: int, now: float | None = None) -> None:
        """Entry `number` of a session neither runs nor waits any more."""
        if self.is_asked(session, number):
            placed = self.entries.pop(session).placed
            if now is not None and placed is not None:
                self.held_s = now - placed if self.held_s is None else 0.7 * self.held_s + 0.3 * (now - placed)

    def is_asked(self, session: str, number: int) -> bool:
        """Whether nobody has asked for the session since entry `number`."""
        return session in self.entries and self.entries[session].number == number

    def waits(self) -> int:
        return sum(one.state == QUEUED for one in self.entries.values())

    def people_wait(self) -> bool:
        """Whether a live session waits: then jobs make room at their next chunk."""
        return any(one.state == QUEUED and one.kind == "live" for one in self.entries.values())

    def load(self) -> float:
        """(running + waiting) / places: what an autoscaler looks at."""
        return len(self.entries) / max(1, self._places())

    def _places(self) -> int:
        return sum(place.slots for place in self.workers.values() if place.generation >= self.generation)

    def _set(self, session: str, state: str, **fields: object) -> None:
        entry = self.entries[session]
        checked_transition(entry.state, state)
        self.entries[session] = replace(entry, state=state, **fields)  # type: ignore[arg-type]
