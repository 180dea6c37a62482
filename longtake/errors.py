"""The one exception type a user sees: what happened, got, expected, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LongtakeError(Exception):
    """An error the user can act on. The command line prints it without a traceback and exits with `exit_code`.

    Args:
        what: what happened, one clause, no full stop.
        got: what was found (shown as "got: ...").
        expected: what was needed (shown as "expected: ...").
        fix: what to do about it (shown as "fix: ...").
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        parts = [what]
        for label, value in (("got", got), ("expected", expected), ("fix", fix)):
            if value is not None:
                parts.append(f"  {label}: {value}")
        super().__init__("\n".join(parts))


def some(names: Iterable[object], limit: int = 10) -> str:
    """The first names of a list for an error, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def nearest(name: object, known: Iterable[str], otherwise: str) -> str:
    """A fix for an unknown name: the nearest that is known, or `otherwise` where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


class UnavailableError(LongtakeError):
    """Something asked for cannot run on this machine (no GPU, no TensorRT flavour, no trtexec)."""

    exit_code = 3


class IntegrityError(LongtakeError):
    """A file is truncated, altered, swapped, or was made for something else."""

    exit_code = 4


class GateError(LongtakeError):
    """An accuracy gate failed."""

    exit_code = 5
