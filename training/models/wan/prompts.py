"""The words that mark a cut in a prompt."""

from __future__ import annotations

CUT_PREFIX = "The scene transitions. "


def with_cut_prefix(caption: str, cut: bool) -> str:
    """The prompt of a chunk: the caption, announced by the cut prefix where a new shot begins."""
    return CUT_PREFIX + caption if cut else caption
