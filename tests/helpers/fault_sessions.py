"""Exceptions at every boundary of a chunk, decoder errors and cancels: the session is as it was, and the next try the same."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from faults import Row
from toy_backend import ToyBackend, toy_tokenize

from longtake.errors import LongtakeError
from longtake.runtime.chunk import Chunk
from longtake.runtime.generator import Generator
from longtake.runtime.sampling import CancelledError
from longtake.runtime.session import Session
from longtake.runtime.story import Segment

STORY = (
    Segment("a red one", 2),
    Segment("a blue two", 2, cut=True),
    Segment("a green three", 3),
    Segment("end", 1, True),
)
ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, OSError, SystemExit)


def new_session(toy: Any) -> Session:
    return Generator(toy, toy_tokenize).session(STORY, seed=3, steps=2, guidance=2.0)


def digest(session: Session) -> str:
    """Position, and every tensor that the next chunk reads."""
    snapshot = session.snapshot()
    read = [slot for slot in snapshot.position.slots.plan(False).inputs["table"] if slot >= 0]
    state = hashlib.sha256(repr(snapshot.position).encode())
    for name in sorted(snapshot.tensors):
        tensor = snapshot.tensors[name]
        state.update((tensor if name.startswith("decoder") else tensor[sorted(read)]).numpy().tobytes())
    return state.hexdigest()


def same(a: Chunk, b: Chunk) -> bool:
    return a.index == b.index and torch.equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames)


class Boundaries:
    """Counts every call that a chunk makes of the backend, the decoder and the session itself; raises in one of them."""

    def __init__(self, session: Session, toy: Any) -> None:
        self.count, self.at, self.error = 0, -1, RuntimeError("boundary")
        toy.hook = lambda call: self.step()
        toy.on_decode = self.step
        queue, commit = session._decoding, session._commit
        assert queue is not None
        submit = queue.submit

        def submitted(*words: Any) -> Any:
            self.step()
            frames = submit(*words)
            self.step()
            return frames

        def committed(*words: Any, **more: Any) -> None:
            self.step()
            commit(*words, **more)

        queue.submit, session._commit = submitted, committed  # type: ignore[method-assign]

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.error


def boundaries(count: int, cancels: int, seed: int) -> Row:
    """`count` exceptions at boundaries, one after the other, and `cancels` cancels, over as many sessions as that takes."""
    row = Row("exceptions at boundaries of a chunk, cancels", count + cancels, "session unchanged, next chunk identical, decoder errors recovered")  # fmt: skip
    with new_session(ToyBackend()) as undisturbed:
        expected = list(undisturbed)
    chance, done, decoder_errors = random.Random(seed), 0, 0
    while done < count + cancels:
        toy = ToyBackend()
        with new_session(toy) as session:
            calls = Boundaries(session, toy)
            for wanted in expected:
                for attempt in range(8):
                    if done >= count + cancels:
                        break
                    before = digest(session)
                    cancel, error = done >= count, ERRORS[done % len(ERRORS)](f"injected {done}")
                    done += 1
                    decoder_errors += _disturbed(session, calls, cancel, error, chance, attempt)
                    row.check(
                        session.next_index == wanted.index, f"{done}: next is {session.next_index}, not {wanted.index}"
                    )
                    row.check(
                        digest(session) == before,
                        f"{done}: chunk {wanted.index}, the session has changed after {error!r}",
                    )
                calls.at = -1
                row.check(same(next(session), wanted), f"{done}: chunk {wanted.index} is another one")
    row.facts |= {"decoder errors": decoder_errors, "exceptions": count, "cancels": cancels}
    return row


def _disturbed(
    session: Session, calls: Boundaries, cancel: bool, error: BaseException, chance: random.Random, attempt: int
) -> bool:
    """One attempt that is cut off somewhere; whether it was the decoder that failed."""
    session._conditioner.forget()
    calls.count, calls.error = 0, error
    # 4 calls for two prompts, 4 guided passes, 2 clean ones, 2 of the hand-over, 1 of the commit, and 8 or more latents
    calls.at = -1 if cancel else 1 + (attempt * 3 + chance.randrange(3)) % 21
    if cancel:
        session.cancel()
    try:
        chunk = next(session)
    except (CancelledError, LongtakeError, *ERRORS):
        return False
    try:
        chunk.frames  # noqa: B018
    except (*ERRORS, LongtakeError):
        return True
    raise AssertionError(f"nothing was raised at boundary {calls.at} of {calls.count}")
