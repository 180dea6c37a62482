"""OpenAI's Videos API over the same sessions: jobs."""

from __future__ import annotations

from fastapi import APIRouter

from longtake.runtime.serve.front import Front


def videos_of(front: Front) -> APIRouter:
    """The routes under /v1/videos."""
    return APIRouter()
