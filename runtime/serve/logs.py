"""Logs as one JSON object a line. Prompts are shown as their length and a short hash, unless they are asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from typing import Any

OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PROMPTS = {"shown": False}


class JsonLines(logging.Formatter):
    """ts, level, event, and whatever was passed in `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        about: dict[str, Any] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in OWN},
        }
        if record.exc_info:
            about["exception"] = self.formatException(record.exc_info)
        return json.dumps(about, ensure_ascii=True, default=str)


def configure(level: str, prompts: bool) -> None:
    """Send the project's log, as JSON lines, to stderr."""
    _PROMPTS["shown"] = prompts
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.formatter.converter = time.gmtime  # type: ignore[union-attr]
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.getLogger("longtake").setLevel(level.upper())


def shown(prompt: str | None) -> dict[str, Any] | str | None:
    """A prompt as the log may have it."""
    if prompt is None or _PROMPTS["shown"]:
        return prompt
    return {"characters": len(prompt), "sha256": hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:8]}
