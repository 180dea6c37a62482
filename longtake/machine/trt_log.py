"""TensorRT's log, passed on to `logging`, its errors kept so that an exception can quote them."""

from __future__ import annotations

import logging
import re
from typing import Any

log = logging.getLogger("longtake.tensorrt")


SCRATCH = re.compile(r"Total Activation Memory: ([0-9]+) bytes")
_scratch: list[int] = []  # of the process: TensorRT goes on with the first logger it was given, whoever gave it


def scratch_of_last_build() -> int | None:
    """Bytes of scratch that a context of the plan built last will want, as the builder said; None if it did not."""
    return _scratch[-1] if _scratch else None


def forget_scratch() -> None:
    """Before a build, so that `scratch_of_last_build` is about it."""
    _scratch.clear()


def note_scratch(size: int | None) -> None:
    """What the builder said of a plan that another process built."""
    _scratch[:] = [] if size is None else [size]


class Messages:
    """`logger` goes into TensorRT's builder, parser or runtime. TensorRT's warnings are chatty: they become INFO."""

    def __init__(self, trt: Any) -> None:
        errors: list[str] = []
        severity = trt.ILogger.Severity
        levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.INFO}

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    errors.append(message)
                    del errors[:-8]
                if found := SCRATCH.search(message):
                    _scratch.append(int(found[1]))
                log.log(levels.get(level, logging.DEBUG), "%s", message)

        self.errors, self.logger = errors, Logger()

    def last_errors(self) -> str:
        """The last two errors, for an exception's text."""
        return "; ".join(self.errors[-2:]) or "no message from TensorRT"
