"""Who asks over HTTP."""

from __future__ import annotations

from fastapi import Request

from longtake.runtime.serve.contract import ServeError
from longtake.runtime.serve.front import Front


def user_of(front: Front, request: Request) -> str:
    """Who asks. Raises ServeError 401."""
    user = front.door.user(request.headers.get("authorization"))
    if user is None:
        detail = {"expected": "Authorization: Bearer TOKEN"}
        raise ServeError("unauthorized", "a token is needed", status=401, detail=detail)
    return user
