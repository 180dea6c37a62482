"""Settings that come from files: an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
from typing import Any

from longtake.errors import LongtakeError


def reject_unknown_keys(given: dict[str, Any], known: list[str], where: str) -> None:
    """Raise LongtakeError naming the nearest known key for the first unknown one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise LongtakeError(
                f"unknown key in {where}",
                got=repr(key),
                expected="one of " + ", ".join(known),
                fix=f"did you mean {near[0]!r}?" if near else f"remove {key!r}",
            )
