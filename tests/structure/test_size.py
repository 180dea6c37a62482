"""The tree's size and shape. The bounds only go down: whoever gets below one lowers it."""

from __future__ import annotations

import subprocess

import tree

MOST_BYTES = 50_000_000  # of what git tracks: the tree travels whole to where it runs
MOST_LINES = 61_535
MOST_FILES_OVER_350_LINES = 0
MOST_FUNCTIONS_OVER_60_LINES = 0
MOST_HAND_LAID_LINES = 47


def test_the_library_does_not_grow() -> None:
    assert sum(map(tree.lines, tree.library_files())) <= MOST_LINES


def test_the_tree_is_light() -> None:
    named = subprocess.run(["git", "ls-files", "-z"], cwd=tree.ROOT, capture_output=True, text=True, check=True).stdout
    files = [tree.ROOT / name for name in named.split("\0") if name]
    assert sum(path.lstat().st_size for path in files if path.exists()) <= MOST_BYTES


def test_files_are_short() -> None:
    long = {path.relative_to(tree.ROOT).as_posix(): tree.lines(path) for path in tree.library_files()}
    long = {name: count for name, count in long.items() if count > 350}
    assert len(long) <= MOST_FILES_OVER_350_LINES, long


def test_functions_are_short() -> None:
    long = [
        (path.name, name, size) for path in tree.library_files() for name, size in tree.functions(path) if size > 60
    ]
    assert len(long) <= MOST_FUNCTIONS_OVER_60_LINES, long


def test_lines_are_laid_out_by_the_formatter() -> None:
    marked = sum(path.read_text(encoding="utf-8").count("# fmt: skip") for path in tree.library_files())
    assert marked <= MOST_HAND_LAID_LINES
