"""Settings as people give them: an unknown key is an error that names the nearest known one; 7.0 is the whole number 7."""

from __future__ import annotations

import operator
from typing import Any

from longtake.errors import LongtakeError, nearest


def reject_unknown_keys(given: dict[str, Any], known: list[str], where: str) -> None:
    """Raise LongtakeError naming the nearest known key for the first unknown one."""
    for key in given:
        if key not in known:
            fix = nearest(key, known, f"remove {key!r}")
            expected = "one of " + ", ".join(known)
            raise LongtakeError(f"unknown key in {where}", got=repr(key), expected=expected, fix=fix)


def whole_number(value: Any, what: str, fix: str) -> int:
    """`value` as an int: 7, 7.0 or an integer of another library. Raises LongtakeError for 7.5, True, "7" and the rest."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise LongtakeError(f"bad {what}", got=repr(value), expected="a whole number", fix=fix)
