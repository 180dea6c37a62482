"""Temporary files that say whose they are, so that what a killed process left behind is deleted by the next one.

A temporary file's name holds the number of its process, which keeps it locked while it lives. Two processes in two
containers may have the same number, and some libraries put a new, unlocked file under the name: a file is left over
only if nobody holds its lock, and its process is gone or is this one, which knows its own.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

STEM = 40  # characters of a name that its temporary file keeps, so that no name is too long for one
NAME = re.compile(r"\..*\.(\d+)-[0-9a-f]{8}\.tmp(\..*)?", re.DOTALL)

_own: set[str] = set()  # names of this process's temporary files
_swept: set[str] = set()  # folders that this process has looked through
_lock = threading.Lock()


def temporary_name(path: Path) -> str:
    """The name of a new temporary file for `path`."""
    return f".{path.stem[:STEM]}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix[:STEM]}"


def hold(handle: int, path: Path) -> None:
    """Mark the temporary file at `path`, open as `handle`, as in use."""
    _own.add(path.name)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: then the number alone decides
        pass


def release(handle: int, path: Path) -> None:
    """Undo `hold`, and close `handle`."""
    os.close(handle)
    _own.discard(path.name)


@contextmanager
def locked(folder: Path, reads: bool = False) -> Iterator[None]:
    """One process at a time makes what lies in `folder`, and nobody `reads` it meanwhile; the others wait.

    A folder that cannot be written to is not locked: nobody makes anything there.
    """
    how = fcntl.LOCK_SH if reads else fcntl.LOCK_EX
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115
    except OSError:
        if not reads:
            raise
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except OSError:
            log.warning("another process is at work in %s; waiting for it", folder)
            fcntl.flock(lock, how)
        yield


def sweep_once(folder: Path) -> None:
    """`sweep`, at the first write of this process into `folder`."""
    with _lock:
        if (place := str(folder)) in _swept:
            return
        _swept.add(place)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Delete the temporary files of dead processes in `folder`; what cannot be deleted stays."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return
    for name in names:
        match = NAME.fullmatch(name)
        if match and name not in _own and _is_dead(int(match[1])) and _is_free(folder / name):
            try:
                os.unlink(folder / name)
            except OSError:
                continue


def _is_dead(number: int) -> bool:
    if number == os.getpid():  # not one of its own: of an earlier process of this number
        return True
    try:
        os.kill(number, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    except OverflowError:
        return True
    return False


def _is_free(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(handle)
    return True
