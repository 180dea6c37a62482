"""What two threads, or two processes, could have spoiled between them: each made to happen at the one moment that counts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import PROMPT, Served, parked

from longtake.runtime.serve.desk import Desk, asked
from longtake.runtime.serve.grants import WorkerLostError
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.local import LocalWorkers
from longtake.runtime.serve.meters import silent

FLOW = {"mode": "ack", "window": 1}


def test_a_chunk_before_a_whole_state_that_cannot_be_decoded_is_made_again(start: Any) -> None:
    """The state after chunk 15 waits for its frames, and so is the first to hear that there are none."""
    server: Served = start()
    whole = server.live(prompt=PROMPT, chunks=18, seed=3)
    whole.until("session.done")
    live = server.live(prompt=PROMPT, chunks=18, seed=3, flow=FLOW)
    for chunk in range(14):
        live.chunk(chunk)
        live.send("session.ack", chunk=chunk)
    live.chunk(14)
    left = [1]

    def broken() -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("broken")

    server.backends[-1].on_decode = broken
    live.send("session.ack", chunk=14)
    session = live.until("session.done", ack=True)["session_id"]
    assert left == [0] and live.fragments() == whole.fragments()
    assert server.store.journal(session).snapshots()[0][0] == 16


class Meanwhile(Journal):
    """Another thread does something between a look at the disk and what follows from it."""

    then: Callable[[], Any] | None = None

    def _path(self, index: int) -> Path:
        then, self.then = self.then, None
        if then is not None:
            then()
        return super()._path(index)


def test_chunks_are_counted_by_several_threads(server: Served) -> None:
    live = server.live(prompt=PROMPT, chunks=3)
    session = live.until("session.done")["session_id"]
    journal = Meanwhile(server.store.folder(session))
    journal.then = journal.count
    assert journal.count() == 3
    journal.cut_back(1)
    assert journal.count() == 1
    other = Journal(server.store.folder(session))
    other._known = 3  # it counted before they were put aside
    assert other.count() == 1


def test_a_viewer_of_a_session_whose_files_were_damaged_sees_all_of_it(start: Any) -> None:
    server: Served = start(pause_s=0.005)
    live = server.live(prompt=PROMPT, chunks=6, seed=3, flow={"mode": "ack", "window": 2})
    session = live.until("video.start")["session_id"]
    for chunk in range(4):
        live.chunk(chunk)
        live.send("session.ack", chunk=min(chunk, 2))  # the last one is not begun: the session is parked, not done
    live.close()
    parked(server, session)
    journal = server.store.journal(session)
    victim = journal.folder / journal.chunk(1)["latents"]
    victim.write_bytes(bytes(100))
    again = server.live(type="session.resume", session_id=session, flow={"mode": "ack", "window": 2})
    again.until("session.done", ack=True)
    assert sorted(again.media) == list(range(6))
    assert {index: data for index, data in again.fragments().items() if index < 4} == live.fragments()


def test_a_place_that_comes_free_while_the_server_ends_is_none(start: Any) -> None:
    server: Served = start(pause_s=0.02)
    first = server.live(prompt=PROMPT, endless=True, flow=FLOW)
    first.chunk(0)
    second = server.live(prompt=PROMPT, endless=True, flow=FLOW)
    second.until("session.queued")
    begun = time.monotonic()
    server.end()
    assert time.monotonic() - begun < 8
    assert first.closed() == second.closed() == 1001
    counts = sorted(journal.count() for journal in server.store.all())
    assert counts[0] == 0 and counts[1] >= 1


def test_what_was_made_is_kept_before_a_session_is_parked(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked to end between the choice of whose turn it is and the turn, while a chunk waits to be encoded."""
    from longtake.runtime.serve import worker

    encode, turn, asked = worker.keep_chunk, worker.Worker._next, threading.Event()

    def held(journal: Journal, preset: Any, chunk: Any, position: Any) -> Any:
        if chunk.index == 1:
            assert asked.wait(20)
            time.sleep(0.3)
        return encode(journal, preset, chunk, position)

    def chosen(self: worker.Worker) -> Any:
        live = turn(self)
        if live is not None and live.session is not None and live.index == 2 and not live.ending:
            live.ending = "park"
            asked.set()
        return live

    monkeypatch.setattr(worker, "keep_chunk", held)
    monkeypatch.setattr(worker.Worker, "_next", chosen)
    server: Served = start()
    live = server.live(prompt=PROMPT, chunks=6, seed=3)
    session = live.until("video.start")["session_id"]
    live.chunk(1)
    assert live.closed() == 1001
    journal = server.store.journal(session)
    assert journal.count() == 2 and journal.snapshots()[0][0] == 2


def test_a_worker_that_is_lost_while_the_clock_ticks_ends_no_connection(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Served = start()
    real, lost = LocalWorkers.advance, [3]

    async def advance(self: LocalWorkers, *words: Any) -> None:
        if lost[0]:
            lost[0] -= 1
            raise WorkerLostError("gone")
        await real(self, *words)

    monkeypatch.setattr(LocalWorkers, "advance", advance)
    live = server.live(prompt=PROMPT, chunks=3, flow={"mode": "realtime", "window": 1})
    live.until("session.done")
    assert lost == [0] and live.closed() == 1000


def test_who_goes_away_while_a_place_is_asked_for_leaves_none_taken(server: Served) -> None:
    class Far(Desk):
        """A registry whose answers take their time."""

        async def ask(self, *words: Any) -> int:
            number = await super().ask(*words)
            heard.set()
            await asyncio.sleep(0.1)
            return number

    session = server.live(prompt=PROMPT, chunks=1).until("session.done")["session_id"]
    journal = server.store.journal(session)

    async def main() -> None:
        desk = Far(Limits(), silent())
        await desk.register("w", 1, 0, {})
        task = asyncio.create_task(asked(desk, journal))
        await heard.wait()
        assert desk.registry.state(session) == "placing"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert desk.registry.state(session) is None and desk.registry.load() == 0

    heard = asyncio.Event()
    asyncio.run(main())


def test_chunks_are_added_between_two_of_them(toy: Any, make_generator: Any) -> None:
    """How many there are in all is said while no chunk can begin or end."""
    session = make_generator(toy).session(PROMPT, chunks=3)
    totals: list[int] = []
    waiting = threading.Event()

    def record(total: int) -> None:
        here = session.position
        threading.Thread(target=lambda: (waiting.set(), session.change_prompt("night"))).start()
        assert waiting.wait(5)
        time.sleep(0.05)
        assert session.position is here
        totals.append(total)

    def extend(call: int) -> None:
        toy.hook = lambda later: None
        session.extend(2, record=record)

    next(session)
    toy.hook = extend  # in the middle of the second chunk
    assert len(list(session)) == 4 and totals == [5]

    def refuse(total: int) -> None:
        raise OSError("full")

    again = make_generator(toy).session(PROMPT, chunks=2)
    with pytest.raises(OSError, match="full"):
        again.extend(3, record=refuse)
    assert again.remaining == 2
