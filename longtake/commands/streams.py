"""Standard input, output and errors that may be closed, or close while a command runs: no run that writes files ends by it."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody reads the pipe, the terminal is gone, it was closed


def open_standard_streams() -> None:
    """Give each closed stream the null device, so that no file of ours gets its number and with it what others print;
    and let what is printed to a stream that closes later go nowhere."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            place = os.open(os.devnull, os.O_RDWR)
            if place != number:
                os.dup2(place, number)
                os.close(place)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _Kept(os.fdopen(os.dup(number), "wb", 0), errors="backslashreplace", write_through=True))
        elif type(stream) is io.TextIOWrapper and _number_of(stream) == number:  # not what a test captures it with
            with suppress(OSError):
                stream.flush()
            binary = open(number, "wb", closefd=False)  # noqa: SIM115  (as long as the process)
            kept = _Kept(binary, stream.encoding, stream.errors, line_buffering=True)  # progress is seen in a log, too
            setattr(sys, name, kept)


class _Kept(io.TextIOWrapper):
    """A text stream whose writes go nowhere once nobody is there to read them."""

    def write(self, text: str) -> int:
        with _unheard(self):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with _unheard(self):
            super().flush()


@contextmanager
def _unheard(stream: io.TextIOWrapper) -> Iterator[None]:
    """Inside, an error that says that a stream's reader is gone turns the stream to the null device."""
    try:
        yield
    except OSError as error:
        if error.errno not in GONE:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _number_of(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None
