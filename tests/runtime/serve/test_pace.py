"""What holds up a stream and what does not: encoding, and writing whole states."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from serving import PROMPT, Live, Served

from longtake.runtime.serve import keeping, states
from longtake.runtime.serve.fragments import CODECS, Codec
from longtake.runtime.serve.states import chunks_between

STAGE_S = 0.3


def gaps(live: Live, first: int, last: int) -> list[float]:
    live.until("session.done")
    return [live.at[index] - live.at[index - 1] for index in range(first, last + 1)]


def test_three_stages_take_as_long_as_the_longest(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is made while the one before is decoded and the one before that encoded."""
    made = keeping.fragment

    def encode(*given: Any) -> Any:
        time.sleep(STAGE_S)
        return made(*given)

    monkeypatch.setattr(keeping, "fragment", encode)
    server: Served = start()
    steps = 2
    server.backends[-1].hook = lambda call: time.sleep(STAGE_S / (steps + 1))
    latents = server.backends[-1].preset.chunk_latents
    server.backends[-1].on_decode = lambda: time.sleep(STAGE_S / latents)
    best = min(
        sorted(gaps(server.live(prompt=PROMPT, chunks=9, seed=seed, num_inference_steps=steps, guidance_scale=1.0), 4, 8))[2]
        for seed in range(3)
    )  # fmt: skip
    assert STAGE_S <= best < 1.4 * STAGE_S


def test_writing_states_holds_up_no_chunk(start: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(states, "EVERY", 2)
    monkeypatch.setattr(states, "snapshot_to_file", lambda *_: time.sleep(4))
    caplog.set_level("INFO", logger="longtake")
    server: Served = start()
    begun = time.monotonic()
    session = server.live(prompt=PROMPT, chunks=12, seed=1).until("session.done")["session_id"]
    assert time.monotonic() - begun < 4
    assert server.store.journal(session).count() == 12
    assert "older ones are being written" in caplog.text


def test_large_states_are_written_seldom() -> None:
    assert chunks_between(5_800_000) == states.EVERY
    assert chunks_between(6_100_000_000) == 122


def test_a_state_that_is_not_worth_its_bytes_is_not_kept(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal alone goes on with the same chunks."""
    whole = start().live(prompt=PROMPT, chunks=6, seed=5)
    whole.until("session.done")
    monkeypatch.setattr(states, "BYTES_A_CHUNK", 1)
    server: Served = start(store=tmp_path / "parked")
    live = server.live(prompt=PROMPT, chunks=6, seed=5, flow={"mode": "ack", "window": 1})
    session = live.until("video.start")["session_id"]
    live.chunk(2, ack=True)
    server.end()
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
