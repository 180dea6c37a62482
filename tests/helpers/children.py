"""The processes that a process has started, by any of its threads; Linux only."""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> list[int]:
    """Their ids."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted(int(word) for words in lists for word in words)
