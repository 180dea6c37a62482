"""One session of a store is damaged: the others are served, driven and cleaned as if it were not there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from journals import begin

from longtake.errors import IntegrityError
from longtake.runtime.serve import jobs
from longtake.runtime.serve.desk import Desk
from longtake.runtime.serve.jobs import Jobs
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.meters import silent
from longtake.runtime.serve.store import Store, new_id
from longtake.runtime.serve.videos import Videos

NO_END = ["{", "{}", "[]", "null", '{"state": "done", "reason": "", "code": "", "at": "x"}']


def front(store: Store) -> Any:
    return SimpleNamespace(store=store, desk=Desk(Limits(), silent()), limits=Limits())


@pytest.mark.parametrize("text", NO_END)
def test_a_job_whose_end_is_damaged_has_failed(store: Store, generator: Any, text: str) -> None:
    job = begin(store, generator, id=new_id("video"), kind="video", frames=29)
    (job.folder / "end.json").write_text(text)
    status = asyncio.run(Videos(front(store)).status(job))
    assert status["status"] == "failed" and status["error"]["code"] == "end_damaged"
    end = job.end()
    assert end and store.expire(1e9, 60.0, end["at"] + 59) == [] and store.expire(1e9, 60.0, end["at"] + 61) == [job.id]


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"epoch": "x"}'])
def test_a_job_whose_lease_is_damaged_keeps_no_other(store: Store, generator: Any, text: str) -> None:
    broken = begin(store, generator, id=new_id("video"), kind="video", created=0.0)
    (broken.folder / "lease.json").write_text(text)
    with pytest.raises(IntegrityError):
        broken.leased()
    ended = begin(store, generator, id=new_id("video"), kind="video", created=0.5)
    (ended.folder / "end.json").write_text("{")
    job = begin(store, generator, id=new_id("video"), kind="video")

    async def known() -> frozenset[str]:
        driving = Jobs(all_of := front(store))
        driving._run = lambda journal, number: asyncio.sleep(0)  # type: ignore[method-assign, assignment]
        await driving.begin()
        driving.end()
        return await all_of.desk.known()

    assert asyncio.run(known()) == {job.id}


def test_cleaning_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "EXPIRE_EVERY", 0.0)
    calls: list[int] = []

    async def cleaned() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()

        def expire(*words: Any, **more: Any) -> list[str]:
            calls.append(len(calls))
            if len(calls) == 1:
                raise OSError("Input/output error")
            loop.call_soon_threadsafe(over.set)
            return []

        store = SimpleNamespace(expire=expire, all=lambda: ())
        driving = Jobs(front(store))  # type: ignore[arg-type]
        await driving.begin()
        await asyncio.wait_for(over.wait(), 60)
        driving.end()

    asyncio.run(cleaned())
    assert len(calls) > 1


def test_what_expires_says_when(store: Store, generator: Any) -> None:
    live, job = begin(store, generator, frames=29), begin(store, generator, id=new_id("video"), kind="video", frames=29)
    for journal in (live, job):
        journal.finish("done")
    told = [asyncio.run(Videos(front(store)).status(journal))["expires_at"] for journal in (live, job)]
    end = job.end()
    assert end and told == [None, int(end["at"] + Limits().kept_s)]
