"""Whole states beside a journal's chunks: which are worth their bytes, and the thread that writes them.

A state saves whoever resumes one pass for each chunk before it. It takes megabytes with a small model and gigabytes with a large
one, so a large one is kept seldom. While a session runs, neither the device nor the encoder waits for its disk.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import weakref
from collections.abc import Callable

import torch

from longtake.cuda_streams import on_own_stream
from longtake.errors import LongtakeError
from longtake.runtime.chunk import Chunk
from longtake.runtime.serve.journal import Journal, LeaseLostError
from longtake.runtime.session import Session
from longtake.runtime.snapshot import Snapshot, snapshot_to_file

log = logging.getLogger(__name__)

EVERY = 16  # chunks, at least
BYTES_A_CHUNK = 50_000_000  # of states, that may be written on average for a chunk: a pass costs about as long


def chunks_between(size: int) -> int:
    """How many chunks lie between two states of `size` bytes."""
    return max(EVERY, math.ceil(size / BYTES_A_CHUNK))


def is_worth_keeping(session: Session, journal: Journal) -> bool:
    """Whether a session that is put aside is sooner resumed from its state than by making the chunks since the last one again."""
    count = journal.count()
    last = next((chunk for chunk, _ in journal.snapshots(count)), 0)
    return count > last and (count - last) * BYTES_A_CHUNK >= session.state_bytes


def keep_state(journal: Journal, state: Snapshot) -> None:
    """Keep a whole state; older ones go.

    Raises:
        LeaseLostError, OSError: another worker has the session, or it was deleted; the disk is full, or gone.
    """
    journal.require_lease()
    path = journal.snapshot_path(state.position.chunk)
    snapshot_to_file(state, path)
    try:
        journal.require_lease()  # writing took its time
    except LeaseLostError:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # of a session that was deleted meanwhile
        raise
    journal.keep_snapshots()


class StateKeeper:
    """Takes states and writes them, in a thread of its own. While one is in memory no other is taken: it may be gigabytes."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self._jobs: queue.SimpleQueue[tuple[Journal, Snapshot] | None] = queue.SimpleQueue()
        self._last: Callable[[], Snapshot | None] = lambda: None
        self._thread = threading.Thread(target=self._run, name=f"longtake-{name}", daemon=True)
        self._thread.start()

    def state_after(self, session: Session, chunk: Chunk) -> Snapshot | None:
        """The whole state, now and then. None, too, if it cannot be had: that a chunk was not decoded its frames will tell."""
        try:
            if (chunk.index + 1) % chunks_between(session.state_bytes):
                return None
            if self._last() is not None:
                log.info("no state is kept after chunk %d: the one before is still being written", chunk.index)
                return None
            state = session.snapshot()
        except (LongtakeError, RuntimeError) as error:
            log.warning("no state is kept after chunk %d: %s", chunk.index, error)
            return None
        self._last = weakref.ref(state)
        return state

    def keep(self, journal: Journal, state: Snapshot) -> None:
        """Have a state written soon. What goes wrong is in the log: the journal alone would do."""
        self._jobs.put((journal, state))

    def close(self, within: float) -> None:
        """Let what is being written end, for `within` seconds at most."""
        self._jobs.put(None)
        self._thread.join(within)

    def _run(self) -> None:
        with on_own_stream(self.device, self):
            while (job := self._jobs.get()) is not None:
                journal, state = job
                try:
                    keep_state(journal, state)
                except Exception as error:  # safetensors has one of its own
                    told = str(error)  # the error itself, in a log that keeps it, would keep the state
                    log.warning("session %s: its state is not kept: %s", journal.id, told)
                del job, state
