"""What holds up a stream and what does not: encoding, and writing whole states."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from serving import PROMPT, Live, Served

from longtake.runtime.serve import keeping, states
from longtake.runtime.serve.fragments import CODECS, Codec
from longtake.runtime.serve.states import chunks_between

STAGE_S = 0.3


def test_three_stages_take_as_long_as_the_longest(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is made while the one before is decoded and the one before that encoded."""
    made = keeping.fragment

    def encode(*given: Any) -> Any:
        time.sleep(STAGE_S)
        return made(*given)

    monkeypatch.setattr(keeping, "fragment", encode)
    server: Served = start()
    toy, steps = server.backends[-1], 2
    toy.hook = lambda call: time.sleep(STAGE_S / (steps + 1))
    toy.on_decode = lambda: time.sleep(STAGE_S / toy.preset.chunk_latents)

    def pace(seed: int) -> float:
        live = server.live(prompt=PROMPT, chunks=9, seed=seed, num_inference_steps=steps, guidance_scale=1.0)
        live.until("session.done")
        return (live.at[8] - live.at[3]) / 5

    assert min(map(pace, range(3))) < 1.5 * STAGE_S  # two in flight take twice as long


def test_writing_states_holds_up_no_chunk(start: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    gate = threading.Event()
    monkeypatch.setattr(states, "EVERY", 2)
    monkeypatch.setattr(states, "snapshot_to_file", lambda *_: gate.wait(60))
    caplog.set_level("INFO", logger="longtake")
    server: Served = start()
    session = server.live(prompt=PROMPT, chunks=12, seed=1).until("session.done")["session_id"]
    assert server.store.journal(session).count() == 12
    assert "the one before is still being written" in caplog.text
    gate.set()
    server.end()


def test_an_error_of_any_kind_ends_no_later_state(
    start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, failed = states.snapshot_to_file, threading.Event()

    def once(*given: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise SafetensorError("no space left")
        write(*given)

    monkeypatch.setattr(states, "EVERY", 2)
    monkeypatch.setattr(states, "snapshot_to_file", once)
    server: Served = start(pause_s=0.02)
    session = server.live(prompt=PROMPT, chunks=12, seed=1).until("session.done")["session_id"]
    server.end()
    assert "its state is not kept: no space left" in caplog.text
    assert server.store.journal(session).snapshots()


def test_a_session_that_is_deleted_while_its_state_is_written_stays_deleted(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, gate, begun = states.snapshot_to_file, threading.Event(), threading.Event()

    def late(*given: Any) -> None:
        begun.set()
        assert gate.wait(60)
        write(*given)

    monkeypatch.setattr(states, "EVERY", 2)
    monkeypatch.setattr(states, "snapshot_to_file", late)
    server: Served = start()
    session = server.live(prompt=PROMPT, chunks=4, seed=1).until("session.done")["session_id"]
    assert begun.wait(60)
    folder = server.store.folder(session)
    shutil.rmtree(folder)
    gate.set()
    server.end()
    assert not folder.exists()


def test_states_ahead_of_the_chunks_go(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "EVERY", 4)
    server: Served = start()
    session = server.live(prompt=PROMPT, chunks=4, seed=1).until("session.done")["session_id"]
    server.end()
    journal = server.store.journal(session)
    assert [chunk for chunk, _ in journal.snapshots()] == [4]
    journal.cut_back(2)
    assert not journal.snapshots()


def test_large_states_are_written_seldom() -> None:
    assert chunks_between(5_800_000) == states.EVERY
    assert chunks_between(6_100_000_000) == 122


def test_a_state_that_is_not_worth_its_bytes_is_not_kept(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal alone goes on with the same chunks."""
    whole = start().live(prompt=PROMPT, chunks=6, seed=5)
    whole.until("session.done")

    def parked(folder: str) -> tuple[Served, str]:
        server: Served = start(store=tmp_path / folder)
        live = server.live(prompt=PROMPT, chunks=6, seed=5, flow={"mode": "ack", "window": 1})
        session = live.until("video.start")["session_id"]
        live.chunk(2, ack=True)
        server.end()
        return server, session

    server, session = parked("kept")
    assert server.store.journal(session).snapshots()
    monkeypatch.setattr(states, "BYTES_A_CHUNK", 1)
    server, session = parked("not_kept")
    assert not server.store.journal(session).snapshots()
    again = start(store=server.store.root)
    rest = Live(again.host, type="session.resume", session_id=session, next_chunk=0)
    rest.until("session.done")
    assert rest.fragments() == whole.fragments()


def test_the_bytes_of_a_state_are_those_of_its_snapshot(make_toy: Any, make_generator: Any) -> None:
    with make_generator(make_toy()) as generator, generator.session(PROMPT, chunks=2) as session:
        next(session)
        kept = sum(t.nbytes for name, t in session.snapshot().tensors.items() if not name.startswith("first"))
        assert session.state_bytes == kept > 0


@pytest.mark.parametrize("name", CODECS)
def test_a_large_picture_gets_more_threads_whatever_the_machine(name: str) -> None:
    assert Codec(name, "", 128, 128, 24).threads == 2
    assert Codec(name, "", 1280, 704, 24).threads == 8
