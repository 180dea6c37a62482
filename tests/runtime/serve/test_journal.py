"""The journal without a server: what is kept, what is damaged, who may write."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from journals import begin

from longtake.errors import IntegrityError, LongtakeError
from longtake.runtime.serve.contract import Resume
from longtake.runtime.serve.fork import Wish, fork
from longtake.runtime.serve.journal import Journal, LeaseLostError
from longtake.runtime.serve.keeping import keep_chunk
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.openings import opened
from longtake.runtime.serve.rebuild import OtherEnginesError, rebuild, steers_of
from longtake.runtime.serve.store import Store, new_id
from longtake.runtime.story import Segment


def make(generator: Any, journal: Journal, count: int, session: Any = None) -> Any:
    """Make chunks and keep them; the session goes on."""
    session = session or rebuild(generator, journal)
    for _ in range(count):
        chunk = next(session)
        keep_chunk(journal, generator.backend.preset, chunk, session.position.as_json())
    return session


def film(journal: Journal) -> list[bytes]:
    return [journal.media(index) for index in range(journal.count())]


def whole(store: Store, generator: Any, **more: Any) -> Journal:
    journal = begin(store, generator, **more)
    make(generator, journal, 5)
    return journal


def test_a_rebuilt_session_makes_the_same(store: Store, generator: Any) -> None:
    wanted = film(whole(store, generator))
    for at in range(5):
        journal = begin(store, generator)
        make(generator, journal, at)
        make(generator, journal, 5 - at)
        assert film(journal) == wanted


def test_a_whole_state_spares_the_replay(store: Store, generator: Any, toy: Any) -> None:
    journal = begin(store, generator)
    session = make(generator, journal, 3)
    session.save(journal.snapshot_path(3))
    toy.calls.clear()
    make(generator, journal, 2)
    assert len(toy.calls) == 2 * 4  # three steps and the clean pass each, and no chunk fed again
    assert film(journal) == film(whole(store, generator))
    journal.snapshot_path(3).write_bytes(b"damaged")
    assert rebuild(generator, journal).next_index == 5


def test_a_state_of_another_session_is_not_taken(store: Store, generator: Any) -> None:
    wanted = film(whole(store, generator))
    other = begin(store, generator, script=(("snow", 5, False),))
    make(generator, other, 3).save(other.snapshot_path(3))
    journal = begin(store, generator)
    session = make(generator, journal, 3)
    session.save(journal.snapshot_path(3))
    journal.snapshot_path(3).write_bytes(other.snapshot_path(3).read_bytes())
    make(generator, journal, 2)
    assert film(journal) == wanted
    shutil.copy(journal.snapshot_path(3), journal.snapshot_path(4))  # the same one, at another chunk
    assert rebuild(generator, journal).next_index == 5


def test_what_was_asked_for_comes_again(store: Store, generator: Any) -> None:
    """A change that was kept, for the chunk being made or the one after it, outlives whoever was making it."""
    wanted = begin(store, generator)
    session = make(generator, wanted, 2)
    assert session.cut("night") == 2
    session.extend(2)
    make(generator, wanted, 3, session)
    assert session.change_prompt("dawn") == 5
    make(generator, wanted, 2, session)
    journal = begin(store, generator)
    make(generator, journal, 2)
    journal.append_event({"type": "change", "event_id": "a", "at_chunk": 2, "prompt": "night", "cut": True})
    journal.append_event({"type": "extend", "event_id": "x", "total": 7})
    journal.append_event({"type": "change", "event_id": "b", "at_chunk": 5, "prompt": "dawn", "cut": False})
    for count in (1, 1, 1, 2):
        make(generator, journal, count)
    assert [c["prompt"] for c in journal.chunks()] == [c["prompt"] for c in wanted.chunks()]
    assert film(journal) == film(wanted)


def test_a_line_that_was_not_finished_does_not_count(store: Store, generator: Any) -> None:
    journal = begin(store, generator)
    journal.append_event({"type": "change", "event_id": "a", "at_chunk": 0, "prompt": "night", "cut": False})
    with open(journal.folder / "events.jsonl", "ab") as out:
        out.write(b'{"type": "change", "at_ch')
    assert [event["event_id"] for event in journal.events()] == ["a"]
    again = store.journal(journal.id)
    again.take(2, "v")
    again.append_event({"type": "change", "event_id": "b", "at_chunk": 1, "prompt": "day", "cut": False})
    assert [event["event_id"] for event in journal.events()] == ["a", "b"]


def require_made_again(store: Store, generator: Any, journal: Journal, wanted: list[bytes]) -> None:
    """The third chunk is made once more, and the film is the same."""
    again = store.journal(journal.id)
    again.take(2, "v")
    session = rebuild(generator, again)
    assert session.next_index == again.count() == 2
    make(generator, again, 3, session)
    assert film(again) == wanted


@pytest.mark.parametrize("what", ["latents", "m4s", "json"])
def test_a_damaged_chunk_is_made_again(store: Store, generator: Any, what: str) -> None:
    journal = whole(store, generator)
    wanted = film(journal)
    victim = journal.folder / (
        "000002.json" if what == "json" else journal.chunk(2)["latents" if what == "latents" else "media"]
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 255
    victim.write_bytes(data)
    require_made_again(store, generator, journal, wanted)


@pytest.mark.parametrize("position", [None, [], {}, {"chunk": "x"}, "gone"])
def test_a_chunk_whose_position_is_damaged_is_made_again(store: Store, generator: Any, position: Any) -> None:
    journal = whole(store, generator)
    wanted, path = film(journal), journal.folder / "000002.json"
    about = {**journal.chunk(2), "position": position}
    if position == "gone":
        del about["position"]
    path.write_text(json.dumps(about))
    require_made_again(store, generator, journal, wanted)


@pytest.mark.parametrize(
    "line", ["{", "7", "null", '"x"', "\\xff", "{}", '{"type": "extend", "total": "x"}', '{"type": "change"}']
)
def test_a_damaged_change_is_said(store: Store, generator: Any, line: str) -> None:
    journal = begin(store, generator)
    change = {"type": "change", "event_id": "a", "at_chunk": 0, "prompt": "night", "cut": False}
    (journal.folder / "events.jsonl").write_text(f"{line}\n{json.dumps(change)}\n")
    with pytest.raises(IntegrityError, match="events.jsonl is damaged"):
        journal.events()


def test_only_the_newest_lease_writes(store: Store, generator: Any) -> None:
    journal = begin(store, generator)
    session = make(generator, journal, 1)
    other = store.journal(journal.id)
    other.take(2, "v")
    with pytest.raises(LeaseLostError):
        make(generator, journal, 1, session)
    with pytest.raises(LeaseLostError):
        journal.append_event({"type": "change"})
    with pytest.raises(LeaseLostError):
        store.journal(journal.id).take(1, "w")
    make(generator, other, 4)
    assert film(other) == film(whole(store, generator))


def test_a_chunk_is_written_once(store: Store, generator: Any) -> None:
    journal = begin(store, generator)
    make(generator, journal, 1)
    with pytest.raises(LeaseLostError):
        journal.commit(0, {}, torch.zeros(1), b"", None)


def test_a_full_disk_keeps_what_is_there(store: Store, generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begin(store, generator)
    session = make(generator, journal, 2)
    calls, failing = [0], [0]
    real = os.fsync

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] == failing[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    chunk = next(session)
    for failing[0] in (1, 2, 3):
        calls[0] = 0
        with pytest.raises(OSError, match="No space"):
            keep_chunk(journal, generator.backend.preset, chunk, session.position.as_json())
        assert store.journal(journal.id).count() == store.journal(journal.id).intact(2) == 2
    calls[0], failing[0] = 0, 1
    with pytest.raises(OSError, match="No space"):
        journal.append_event({"type": "change", "event_id": "a", "at_chunk": 3, "prompt": "x", "cut": False})
    assert journal.events() == []
    calls[0], failing[0] = 0, 99
    keep_chunk(journal, generator.backend.preset, chunk, session.position.as_json())
    make(generator, journal, 2, session)
    monkeypatch.undo()
    assert film(journal) == film(whole(store, generator))


def test_other_engines_are_refused(store: Store, generator: Any, toy: Any) -> None:
    journal = whole(store, generator)
    toy.weights = {"dit": "0" * 64}
    rebuild(generator, journal).close()  # where one side does not tell there is a warning only
    journal.amend(identity={**journal.meta.identity, "weights": {"dit": "1" * 64}})
    with pytest.raises(OtherEnginesError, match="another model"):
        rebuild(generator, journal)
    assert journal.count() == 5


def test_forks_share_files(store: Store, generator: Any) -> None:
    journal = whole(store, generator)
    taken = fork(store, journal, new_id("live"), "local", Wish(3))
    assert taken.count() == 3 and film(taken) == film(journal)[:3]
    assert os.stat(taken.folder / taken.chunk(0)["media"]).st_nlink == 2
    taken.take(1, "w")
    make(generator, taken, 2)
    assert film(taken) == film(journal)
    store.remove(journal.id)
    assert rebuild(generator, taken).next_index == 5
    for start in (-1, 6):
        with pytest.raises(LongtakeError, match="chunk to retake from"):
            fork(store, taken, new_id("live"), "local", Wish(start))


def test_the_camera_s_moves_outlive_takes_of_takes_and_remixes(store: Store, generator: Any) -> None:
    journal = begin(store, generator)
    make(generator, journal, 5)
    for at, keys in ((2, "w"), (4, "d")):
        change = {"type": "change", "at_chunk": at, "prompt": None, "cut": False, "camera": {"action": keys}}
        journal.append_event(change)
    moves = [(2, "w"), (4, "d")]

    def moved(taken: Journal) -> list[tuple[int, str]]:
        return [(steer["at"], steer["keys"]) for steer in steers_of(taken)]

    later = fork(store, journal, new_id("live"), "local", Wish(4))
    assert later.count() == 4 and moved(later) == moves
    assert moved(fork(store, later, new_id("live"), "local", Wish(1))) == moves
    told = (Segment("a green three", 2),)
    assert moved(fork(store, journal, new_id("live"), "local", Wish(3, story=told))) == moves[:1]
    remix = Wish(0, story=told, chunks=2, bounded=True, kind="video", remixed_from=journal.id)
    assert moved(fork(store, later, new_id("video"), "local", remix)) == moves


def test_a_fork_of_a_film_whose_end_was_cut(store: Store, generator: Any) -> None:
    journal = begin(store, generator, frames=100, script=(("a red one", 4, False),))
    make(generator, journal, 4)
    assert journal.chunk(3)["frames"] == 7
    longer = fork(store, journal, new_id("video"), "local", Wish(4, chunks=5, frames=140))
    assert longer.count() == 3
    longer.take(1, "w")
    make(generator, longer, 2)
    plain = begin(store, generator, frames=140, script=(("a red one", 5, False),))
    make(generator, plain, 5)
    assert film(longer) == film(plain)


def test_stores(tmp_path: Path, store: Store, generator: Any) -> None:
    with pytest.raises(LongtakeError, match="there is no such session"):
        store.journal("live_0123456789abcdef")
    for bad in ("", "..", "live_1", "video_0123456789abcdeg", "live_0123456789abcdef/.."):
        with pytest.raises(LongtakeError, match="no session"):
            store.folder(bad)
    journal = begin(store, generator)
    (journal.folder / "meta.json").write_text("{")
    with pytest.raises(IntegrityError):
        store.journal(journal.id)
    assert list(store.all()) == [] and store.find(journal.id) is None
    (store.root / "store.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(IntegrityError, match="another version"):
        Store(store.root)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(LongtakeError, match="cannot be written"):
        Store(file)


def test_what_nobody_touches_expires(store: Store, generator: Any) -> None:
    old, new = begin(store, generator), begin(store, generator)
    job = begin(store, generator, id=new_id("video"), kind="video")
    broken = begin(store, generator, id=new_id("video"), kind="video")
    (broken.folder / "meta.json").write_text("{")
    (broken.folder / "end.json").write_text("{}")
    for journal in (old, job, broken):
        os.utime(journal.folder, (1.0, 1.0))
    assert store.expire(60.0, 60.0, spared={old.id}) == []
    assert store.expire(60.0, 60.0) == [old.id]
    job.finish("failed")
    assert store.expire(1e9, 60.0) == [] and store.expire(1e9, 60.0, time.time() + 61) == [job.id]
    assert not job.folder.exists()
    assert [one.id for one in store.all()] == [new.id] and broken.folder.exists()
    assert replace(new.meta, user="x").user == "x" and store.bytes_of("local") > 0


def test_a_change_and_a_resume_say_that_a_session_is_used(store: Store, generator: Any) -> None:
    journal = begin(store, generator)
    change = {"type": "change", "event_id": "a", "at_chunk": 0, "prompt": "night", "cut": False}
    journal.append_event(change)
    os.utime(journal.folder, (1.0, 1.0))
    journal.append_event(change)
    assert store.expire(60.0, 60.0) == []
    os.utime(journal.folder, (1.0, 1.0))

    async def ready() -> str:
        return ""

    front: Any = SimpleNamespace(ready=ready, own=lambda user, session: journal, limits=Limits())
    asyncio.run(opened(front, "local", Resume(session_id=journal.id)))
    assert store.expire(60.0, 60.0) == []
