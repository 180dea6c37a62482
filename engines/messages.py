"""TensorRT's log, passed on to `logging`, its errors kept so that an exception can quote them."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("longtake.tensorrt")


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
                log.log(levels.get(level, logging.DEBUG), "%s", message)

        self.errors, self.logger = errors, Logger()

    def last_errors(self) -> str:
        """The last two errors, for an exception's text."""
        return "; ".join(self.errors[-2:]) or "no message from TensorRT"
