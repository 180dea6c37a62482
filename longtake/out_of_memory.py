"""Telling want of memory from damage: whatever a library calls it, a user must read "out of memory"."""

from __future__ import annotations

import errno
import sys

from longtake.errors import LongtakeError

# What libraries say of it that raise no MemoryError: torch, ONNX Runtime, C++, Rust, the loader, CUDA, FFmpeg.
SAID = (
    "can't allocate memory",
    "cannot allocate memory",
    "could not allocate",
    "failed to allocate",
    "unable to allocate",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "not enough memory",
    "failed to map segment",
    "memory allocation",
    "unable to mmap",
    "can't start new thread",
    "avcodec_open2",  # of our encoder, whose settings never change: it lacks memory or threads
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it came of, is want of memory."""
    seen = 0
    while error is not None and seen < 8:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        torch = sys.modules.get("torch")  # if it isn't imported, nothing of it can have been raised
        if torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ())):
            return True
        if not isinstance(error, LongtakeError) and any(said in str(error).lower() for said in SAID):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def out_of_memory(error: BaseException, doing: str = "") -> LongtakeError:
    """What a user reads of it. doing: while what, such as "opening dit.onnx"."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return LongtakeError(
        f"out of memory {doing}".rstrip(),
        got=lines[0][:300],
        expected="memory for all that is held at once: networks, caches, frames",
        fix="free memory or raise the limit (ulimit -v, a container's), or ask for less: a smaller --batch, --guidance 1",
    )
