"""The order of the files: the longest first."""

from __future__ import annotations

from pathlib import Path

import tree
from longest import LONGEST


def test_the_longest_files_are_there_once() -> None:
    assert len(set(LONGEST)) == len(LONGEST)
    assert [name for name in LONGEST if not (tree.ROOT / "tests" / name).is_file()] == []


def test_they_are_collected_first(request) -> None:  # type: ignore[no-untyped-def]
    """Of the files of this run, whichever they are."""
    tests = tree.ROOT / "tests"
    names = list(dict.fromkeys(Path(item.path).relative_to(tests).as_posix() for item in request.session.items))
    places = [LONGEST.index(name) if name in LONGEST else len(LONGEST) for name in names]
    assert places == sorted(places)
