"""Ctrl-C while a session generates."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from longtake.runtime.session import Session


@contextmanager
def cancel_on_interrupt(session: Session) -> Iterator[None]:
    """Let the first Ctrl-C cancel the session between two passes; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(*_: object) -> None:
        print("\nstopping at the next pass; once more stops at once", file=sys.stderr)
        signal.signal(signal.SIGINT, previous)
        session.cancel()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
