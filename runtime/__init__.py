"""Run: backends, session and chunk loop, decode, report; budget, check, profile and bench."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`from longtake.runtime import Generator` without paying for torch when only the errors are wanted."""
    if name == "Generator":
        from longtake.runtime.generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
