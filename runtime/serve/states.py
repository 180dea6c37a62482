"""Whole states beside a journal's chunks: which are worth their bytes, and the thread that writes them.

A state saves whoever resumes one pass for each chunk before it. It takes megabytes with a small model and gigabytes with a large
one, so a large one is kept seldom; and neither the device nor the encoder waits for its disk.
"""

from __future__ import annotations

import logging
import math
import queue
import threading

import torch

from longtake.cuda_streams import on_own_stream
from longtake.errors import LongtakeError
from longtake.runtime.chunk import Chunk
from longtake.runtime.serve.journal import Journal
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
    last = max((chunk for chunk, _ in journal.snapshots()), default=0)
    return (journal.count() - last) * BYTES_A_CHUNK >= session.state_bytes and journal.count() > last


def state_after(session: Session, chunk: Chunk) -> Snapshot | None:
    """The whole state, now and then. None, too, if it cannot be had: that a chunk was not decoded its frames will tell."""
    if (chunk.index + 1) % chunks_between(session.state_bytes):
        return None
    try:
        return session.snapshot()
    except (LongtakeError, RuntimeError) as error:
        log.warning("no state is kept after chunk %d: %s", chunk.index, error)
        return None


def keep_state(journal: Journal, state: Snapshot) -> None:
    """Keep a whole state; older ones go.

    Raises:
        LeaseLostError, OSError: another worker has the session; the disk is full, or gone.
    """
    journal.require_lease()
    chunk = state.position.chunk
    snapshot_to_file(state, journal.snapshot_path(chunk))
    journal.keep_snapshots(chunk)


class StateKeeper:
    """Writes states in a thread of its own, one at a time; one that comes meanwhile is left out."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self._jobs: queue.Queue[tuple[Journal, Snapshot] | None] = queue.Queue(1)
        self._thread = threading.Thread(target=self._run, name=f"longtake-{name}", daemon=True)
        self._thread.start()

    def keep(self, journal: Journal, state: Snapshot) -> None:
        """Have a state written soon. What goes wrong is in the log: the journal alone would do."""
        try:
            self._jobs.put_nowait((journal, state))
        except queue.Full:
            chunk = state.position.chunk - 1
            log.info("session %s: no state is kept after chunk %d: older ones are being written", journal.id, chunk)

    def close(self, within: float) -> None:
        """Let what is being written end, for `within` seconds at most."""
        try:
            self._jobs.put(None, timeout=within)
        except queue.Full:
            return
        self._thread.join(within)

    def _run(self) -> None:
        with on_own_stream(self.device, self):
            while (job := self._jobs.get()) is not None:
                journal, state = job
                try:
                    keep_state(journal, state)
                except (LongtakeError, OSError, RuntimeError) as error:
                    log.warning("session %s: its state is not kept: %s", journal.id, error)
                del job, state
