"""What a command may write to: asked before the work begins, so that no file is lost at its end.

A file that we write holds our name in its first MiB or its last 64 KiB, or has a side file beside it that says so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from longtake.errors import LongtakeError

MARK = b"longtake"
HEAD, TAIL = 1 << 20, 1 << 16  # bytes that are searched for it
UNWRITABLE = {stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}


def require_mp4(path: Path, fix: str) -> None:
    """Raise LongtakeError for a path that is no mp4's."""
    if path.suffix.lower() != ".mp4":
        raise LongtakeError("the video must be an mp4", got=path, expected="a path ending in .mp4", fix=fix)


def claim_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Refuse outputs that are one file, an input, a folder, a disk or socket, or a file that we did not write.

    Keys say what each is, in a user's words ("--report"). An input may be a folder: then all files in it are read.

    Raises:
        LongtakeError: an output is one of these.
    """
    named = {name: path for name, path in outputs.items() if path is not None}
    read = [(name, file) for name, path in (inputs or {}).items() if path is not None for file in _files(path)]
    for place, (name, path) in enumerate(named.items()):
        for other, earlier in list(named.items())[:place]:
            if _same(path, earlier) and not is_special(path):
                what, got = f"{other} and {name} are the same file", path
                expected, fix = "a file each", f"choose another name for {name}"
                raise LongtakeError(what, got=got, expected=expected, fix=fix)
        for source, file in read:
            if _same(path, file):
                what, got = f"{name} would replace {source}: they are the same file", path
                expected, fix = "another file", f"choose another name for {name}"
                raise LongtakeError(what, got=got, expected=expected, fix=fix)
        _check_place(name, path)


def claim_checkpoints(out: Path, inputs: Mapping[str, Path | None], kinds: Sequence[str]) -> None:
    """`claim_outputs` for a folder of checkpoints, `--out`."""
    names = [f"{kind}{suffix}" for kind in kinds for suffix in (".safetensors", ".json")]
    claim_outputs({f"{name} in --out": out / name for name in names}, inputs)


def is_special(path: Path) -> bool:
    """Whether `path` is there and is written to as it is: a pipe, a terminal, the null device, an open file's number."""
    if os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        return True
    mode = _mode(path)
    return mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _check_place(name: str, path: Path) -> None:
    mode = _mode(path)
    if is_special(path):
        if mode is not None and stat.S_IFMT(mode) in UNWRITABLE:
            raise LongtakeError(
                f"{name} cannot be written",
                got=f"{path}, {UNWRITABLE[stat.S_IFMT(mode)]}",
                expected="a file or a pipe",
                fix=f"choose another name for {name}",
            )
        return
    place = next(
        place for place in Path(os.path.realpath(path)).parents if place.exists()
    )  # of the temporary file, too
    if not os.access(place, os.W_OK):
        what, got, fix = f"{name} cannot be written", f"{place} is not writable", "choose another folder"
        raise LongtakeError(what, got=got, expected="a folder that you may write to", fix=fix)
    if mode is None:
        return
    if stat.S_ISDIR(mode):
        raise LongtakeError(f"{path} is a folder", expected="a file name", fix=f"pass {path}/NAME")
    if not written_by_us(path):
        raise LongtakeError(
            f"{name} would replace a file that longtake did not write",
            got=path,
            expected="a new name, or a file of an earlier run",
            fix=f"choose another name for {name}, or move that file away",
        )


def written_by_us(path: Path) -> bool:
    """Whether a regular file is empty, or bears our mark itself or in the JSON file beside it (a report, a side file)."""
    return _marked(path) or _marked(path.with_suffix(".json"))


def _marked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return not head or MARK in head or MARK in file.read()
    except OSError:
        return False


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _files(path: Path) -> Iterable[Path]:
    return path.iterdir() if path.is_dir() else [path]


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
