"""Ctrl-C, and what ends a command as it does: SIGTERM, SIGHUP (docker stop, Kubernetes, SLURM, a closed terminal).

Whoever handles Ctrl-C handles them: they are passed to the handler of SIGINT that is set at that moment.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 128 + signal.SIGINT
AT_ONCE = 0.5  # seconds: a closing terminal or a service manager often sends both, or one twice, and means one


class Ended:
    """Which signal asked for the end, and when."""

    def __init__(self) -> None:
        self.pid, self.by, self.since = os.getpid(), signal.SIGINT, 0.0
        self.terminals = [number for number in (1, 2) if _is_terminal(number)]

    def code(self, code: int) -> int:
        """The exit code: that of the signal in place of Ctrl-C's."""
        return 128 + self.by if code == INTERRUPTED else code

    def note(self, number: int, frame: FrameType | None) -> None:
        """Do as Ctrl-C does."""
        if os.getpid() != self.pid:  # a forked process has the handler, too; it ends as it would without
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        again = self.by != signal.SIGINT
        if again and time.monotonic() - self.since < AT_ONCE:
            return
        if not again:
            self.by, self.since = signal.Signals(number), time.monotonic()
        if number == signal.SIGHUP:
            self._leave_terminal()
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:  # ignored, as in a shell's background job
            raise KeyboardInterrupt

    def _leave_terminal(self) -> None:
        """What is still to be printed goes nowhere: on a terminal that is gone, printing fails."""
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for number in self.terminals:
                os.dup2(nowhere, number)


@contextmanager
def ended_by_signals() -> Iterator[Ended]:
    """Inside, SIGTERM and SIGHUP are Ctrl-C, unless they are ignored (nohup)."""
    ended = Ended()
    if threading.current_thread() is not threading.main_thread():
        yield ended
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    taken = [number for number in ENDING if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, ended.note)
    try:
        yield ended
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def first_interrupt(then: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C does `then`; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, previous)
        then()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False
