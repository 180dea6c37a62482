"""Sessions used from two threads, after `close` and past the script's end, and whole numbers written as floats."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from longtake.errors import LongtakeError
from longtake.runtime.chunk import Chunk
from longtake.runtime.sampling import CancelledError
from longtake.runtime.session import Session

Make = Callable[[Any], Any]
LATENTS = torch.zeros(1, 8, 16, 8, 8)


@contextmanager
def in_the_middle(toy: Any, session: Session) -> Iterator[list[Any]]:
    """Inside, another thread is within a chunk; afterwards the list holds that chunk, or what was raised."""
    gate, inside, got = threading.Event(), threading.Event(), []

    def hook(call: int) -> None:
        if threading.current_thread() is worker:
            inside.set()
            assert gate.wait(20)

    def work() -> None:
        try:
            got.append(next(session))
        except BaseException as error:  # noqa: BLE001
            got.append(error)

    worker = threading.Thread(target=work)
    toy.hook = hook
    worker.start()
    try:
        assert inside.wait(20)
        yield got
    finally:
        toy.hook = lambda call: None
        gate.set()
        worker.join(20)
        assert not worker.is_alive()


CALLS: dict[str, Callable[[Session, Any], object]] = {
    "the next chunk": lambda session, snapshot: next(session),
    "a chunk that is given": lambda session, snapshot: session.feed(LATENTS, "x"),
    "another state": lambda session, snapshot: session.restore(snapshot),
    "a snapshot": lambda session, snapshot: session.snapshot(),
}


@pytest.mark.parametrize("wanted", CALLS)
def test_a_second_caller_is_refused_and_the_chunk_is_whole(
    toy: Any, make_toy: Any, make_generator: Make, wanted: str
) -> None:
    expected = list(make_generator(make_toy()).session(["x"] * 3, steps=2, guidance=1.0))
    session = make_generator(toy).session(["x"] * 3, steps=2, guidance=1.0)
    snapshot = session.snapshot()
    chunks = [next(session)]
    with in_the_middle(toy, session) as got:
        with pytest.raises(
            LongtakeError,
            match=f"(?s)busy with chunk 1.*got: a call for {wanted}.*one caller at a time.*fix: wait for the chunk",
        ):
            CALLS[wanted](session, snapshot)
    assert same([*chunks, *got, *session], expected)


def test_two_threads_share_out_the_chunks_of_one_video(make_toy: Any, make_generator: Make) -> None:
    expected = list(make_generator(make_toy()).session(["x"] * 12, steps=2, guidance=1.0))
    session, got = make_generator(make_toy()).session(["x"] * 12, steps=2, guidance=1.0), []

    def take() -> None:
        while session.remaining:
            try:
                got.append(next(session))
            except LongtakeError as error:
                assert "busy" in str(error)
                time.sleep(0.0005)  # whoever asks without a pause takes the processor from whoever is at work
            except StopIteration:
                return

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert same(sorted(got, key=lambda chunk: chunk.index), expected)


def same(got: list[Chunk], expected: list[Chunk]) -> bool:
    return len(got) == len(expected) and all(
        a.index == b.index and torch.equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames)
        for a, b in zip(got, expected)
    )


def test_live_changes_come_from_any_thread(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"] * 2, steps=2, guidance=1.0)
    with in_the_middle(toy, session) as got:
        assert session.cut("y") == 1
        session.extend(1, "z")
    assert [chunk.prompt for chunk in [*got, *session]] == ["x", "y", "z"]


# ---- close -----------------------------------------------------------------------------------------------------------

AFTER_CLOSE: dict[str, Callable[[Session, Any], object]] = {
    **{wanted: CALLS[wanted] for wanted in ("the next chunk", "a chunk that is given", "another state")},
    "a live change": lambda session, snapshot: session.cut("y"),
    "more chunks": lambda session, snapshot: session.extend(2),
}


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("wanted", AFTER_CLOSE)
def test_a_closed_session_refuses_at_once(toy: Any, make_generator: Make, wanted: str, decode: bool) -> None:
    session = make_generator(toy).session(["x"] * 3, steps=1, guidance=1.0, decode=decode)
    snapshot, count = session.snapshot(), toy.count
    session.close()
    session.close()
    with pytest.raises(LongtakeError, match=f"(?s)the session is closed.*got: a call for {wanted}.*fix: load"):
        AFTER_CLOSE[wanted](session, snapshot)
    assert toy.count == count and session.next_index == 0


def test_a_closed_session_can_still_be_saved(make_toy: Any, make_generator: Make, tmp_path: Any) -> None:
    expected = list(make_generator(make_toy()).session(["x"] * 3, steps=1, guidance=1.0))
    with make_generator(make_toy()).session(["x"] * 3, steps=1, guidance=1.0) as session:
        next(session)
    session.save(tmp_path / "s.safetensors")
    assert same(list(make_generator(make_toy()).load_session(tmp_path / "s.safetensors")), expected[1:])


def test_close_ends_a_chunk_in_the_making(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"] * 3, steps=3, guidance=1.0)
    with in_the_middle(toy, session) as got:
        session.close()
    assert isinstance(got[0], CancelledError) and session.next_index == 0


def test_a_chunk_finished_as_the_session_closes_is_not_committed(toy: Any, make_generator: Make) -> None:
    """The last pass has begun when `close` comes: there is no decoder any more, and nobody waits for ever."""
    session = make_generator(toy).session(["x"] * 3, steps=1, guidance=1.0)
    closing = threading.Thread(target=session.close)
    closed: list[int] = []

    def hook(call: int) -> None:
        if call == 4 and not closed:  # text, context, one step, the clean pass
            closed.append(call)
            closing.start()
            closing.join(20)

    toy.hook = hook
    with pytest.raises(LongtakeError, match="chunk 0 cannot be decoded\n  got: a session that was closed meanwhile"):
        next(session)
    assert closed and session.next_index == 0


def test_sessions_of_a_closed_generator_refuse(toy: Any, make_generator: Make) -> None:
    with make_generator(toy) as generator:
        session = generator.session(["x"] * 2, steps=1, guidance=1.0)
        next(session)
    with pytest.raises(LongtakeError, match="the generator is closed"):
        next(session)
    session.close()


# ---- past the script's end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [lambda s: s.cut("y"), lambda s: s.change_prompt("y")])
def test_a_live_change_that_nothing_would_show_is_refused(toy: Any, make_generator: Make, edit: Any) -> None:
    session = make_generator(toy).session(["x"] * 2, steps=1, guidance=1.0)
    next(session)
    with in_the_middle(toy, session) as got:
        with pytest.raises(
            LongtakeError, match="(?s)the script ends before chunk 2.*fix: call extend first, or .*endless"
        ):
            edit(session)
    with pytest.raises(LongtakeError, match="the script ends before chunk 2"):
        edit(session)
    session.extend(2)
    assert edit(session) == 2
    assert [chunk.prompt for chunk in [*got, *session]] == ["x", "y", "y"]


def test_what_is_appended_to_an_endless_session_during_a_chunk_is_shown(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"], steps=1, guidance=1.0, endless=True)
    next(session)
    with in_the_middle(toy, session) as got:
        session.extend(1, "y", cut=True)
    assert got[0].prompt == "x"
    chunk = next(session)
    assert (chunk.prompt, chunk.cut) == ("y", True) and next(session).prompt == "y"


def test_a_live_change_while_a_clip_is_fed_takes_the_next_generated_chunk(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"], steps=1, guidance=1.0)
    edits: list[int] = []
    toy.hook = lambda call: edits.append(session.change_prompt("y")) if not edits else None
    assert session.feed(LATENTS, "a clip").prompt == "a clip" and edits == [1]
    assert [chunk.prompt for chunk in session] == ["y"]


# ---- whole numbers ---------------------------------------------------------------------------------------------------


def test_whole_floats_are_whole_numbers(make_toy: Any, make_generator: Make) -> None:
    ints = make_generator(make_toy()).session(["x"], seed=7, steps=4, guidance=1.0, chunks=2)
    floats = make_generator(make_toy()).session(["x"], seed=7.0, steps=np.float64(4), guidance=1, chunks=2.0)
    assert same(list(floats), list(ints))
    assert floats.identity == ints.identity and type(floats.identity.seed) is type(floats.identity.steps) is int
    floats.extend(np.int64(1))
    floats.extend(1.0)
    assert floats.remaining == 2


@pytest.mark.parametrize("value", [7.5, "7", True, float("nan"), float("inf"), [7]])
@pytest.mark.parametrize(("name", "what"), [("seed", "seed"), ("steps", "number of denoise steps"), ("chunks", "number of chunks")])  # fmt: skip
def test_what_is_no_whole_number_is_refused(toy: Any, make_generator: Make, name: str, what: str, value: Any) -> None:
    with pytest.raises(LongtakeError, match=f"(?s)bad {what}.*expected: a whole number.*fix: pass"):
        make_generator(toy).session(["x"], **{name: value})
    session = make_generator(toy).session(["x"], steps=1)
    with pytest.raises(LongtakeError, match="bad number of chunks"):
        session.extend(value)
