"""Replayed chunks and retakes on the toy backend: what is the same, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from longtake.errors import LongtakeError
from longtake.runtime.chunk import Chunk
from longtake.runtime.story import Segment

STORY = (Segment("a red one", 2), Segment("a blue two", 2, cut=True), Segment("a green three", 2))
Make = Callable[[Any], Any]


def same(a: list[Chunk], b: list[Chunk]) -> bool:
    return len(a) == len(b) and all(
        x.prompt == y.prompt and x.cut == y.cut and x.visible == y.visible
        and torch.equal(x.latents, y.latents) and np.array_equal(x.frames, y.frames)
        for x, y in zip(a, b)
    )  # fmt: skip


def filmed(make_toy: Callable[[], Any], make_generator: Make, **options: Any) -> tuple[Any, list[Chunk]]:
    """A session with a live cut, and its six chunks."""
    session = make_generator(make_toy()).session(STORY, seed=3, steps=3, guidance=2.0, **options)
    chunks = [next(session)]
    session.cut("night")
    return session, [*chunks, *session]


def test_replayed_chunks_leave_the_session_where_it_was(make_toy: Any, make_generator: Make) -> None:
    session = make_generator(make_toy()).session(STORY, seed=3, steps=3, guidance=2.0)
    kept = []
    for _ in range(3):
        chunk = next(session)
        kept.append((chunk, session.position))
    session.cut("night")
    rest = list(session)
    again = make_generator(make_toy()).session(STORY, seed=3, steps=3, guidance=2.0)
    replayed = [again.replay(chunk.latents, position) for chunk, position in kept]
    assert same(replayed, [chunk for chunk, _ in kept])
    assert again.position == kept[-1][1]
    assert again.cut("night") == 3
    assert same(list(again), rest)


def test_a_replayed_chunk_must_follow(make_toy: Any, make_generator: Make) -> None:
    session = make_generator(make_toy()).session(STORY, steps=3)
    first, second = next(session), next(session)
    again = make_generator(make_toy()).session(STORY, steps=3)
    with pytest.raises(LongtakeError, match="does not follow"):
        again.replay(second.latents, session.position)
    assert again.next_index == 0 and same([next(again)], [first])


def test_a_retake_without_changes_is_the_same_video(make_toy: Any, make_generator: Make) -> None:
    session, chunks = filmed(make_toy, make_generator, retakes=True)
    for start in (0, 1, 3, 5):
        passes = len(session.model.backend.calls)
        again = session.retake(start)
        assert again.next_index == start
        assert len(session.model.backend.calls) - passes == 2 * start  # of a shared chunk the clean passes alone
        assert same(list(again), chunks[start:])


def test_a_retake_with_another_seed_or_prompt(make_toy: Any, make_generator: Make) -> None:
    session, chunks = filmed(make_toy, make_generator, retakes=True)
    other = list(session.retake(3, seed=4))
    assert [c.prompt for c in other] == [c.prompt for c in chunks[3:]]
    assert not any(torch.equal(a.latents, b.latents) for a, b in zip(other, chunks[3:]))
    changed = session.retake(3)
    assert changed.change_prompt("a grey heron") == 3
    assert [c.prompt for c in changed] == ["a grey heron", "a green three", "a green three"]


def test_a_retake_of_a_retake(make_toy: Any, make_generator: Make) -> None:
    session, chunks = filmed(make_toy, make_generator, retakes=True)
    second = session.retake(2)
    next(second)
    assert same(list(second.retake(1)), chunks[1:])


def test_what_is_asked_for_meanwhile_is_in_a_retake(make_toy: Any, make_generator: Make) -> None:
    session = make_generator(make_toy()).session(STORY, steps=3, retakes=True)
    next(session), next(session)
    session.change_prompt("snow")
    again = session.retake(1)
    assert same(list(again)[1:], list(session))


@pytest.mark.parametrize("start", [-1, 7, 1.5, "2", True])
def test_a_chunk_that_there_is_not(make_toy: Any, make_generator: Make, start: Any) -> None:
    session, _ = filmed(make_toy, make_generator, retakes=True)
    with pytest.raises(LongtakeError, match="chunk to retake from"):
        session.retake(start)


def test_a_session_that_kept_nothing(make_toy: Any, make_generator: Make) -> None:
    session, _ = filmed(make_toy, make_generator)
    with pytest.raises(LongtakeError, match="keeps no chunks") as error:
        session.retake(1)
    assert "retakes=True" in str(error.value)


def test_a_change_that_cannot_be_recorded_is_not_taken(make_toy: Any, make_generator: Make) -> None:
    session = make_generator(make_toy()).session(STORY, steps=3)
    next(session)
    before = session.position

    def full(at: int) -> None:
        raise OSError(f"no space for a change at {at}")

    with pytest.raises(OSError, match="at 1"):
        session.change_prompt("snow", full)
    assert session.position == before


def test_another_position_is_not_adopted(make_toy: Any, make_generator: Make) -> None:
    session = make_generator(make_toy()).session(STORY, steps=3)
    next(session)
    with pytest.raises(LongtakeError, match="another position"):
        session.adopt(replace(session.position, chunk=4))
