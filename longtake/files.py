"""Files that are either whole or absent: atomic writes, digests, disk space."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longtake.errors import IntegrityError, LongtakeError
from longtake.leftovers import hold, release, sweep_once, temporary_name
from longtake.outputs import is_special

MOST_JSON = 64 << 20  # bytes of a JSON file, as objects some twenty times as many


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, else deleted.

    Any exception, Ctrl-C included, leaves whatever stood under `path` before untouched. A link is followed. The file's
    mode is that of the file it replaces, or what the umask leaves of 0666. What is no file (a pipe, a terminal, the
    null device) is written to as it is, once all is there. What killed processes left in the folder is deleted first.
    """
    if is_special(Path(path)):
        with _through(Path(path)) as partial:
            yield partial
        return
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    sweep_once(final.parent)
    partial = final.with_name(temporary_name(final))
    handle = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        hold(handle, partial)
        mode = stat.S_IMODE((final if final.is_file() else partial).stat().st_mode)
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(partial, mode)  # whoever wrote it may have made it anew
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
        release(handle, partial)


@contextmanager
def _through(path: Path) -> Iterator[Path]:
    """A temporary path whose content then goes to `path`, which is no file."""
    with tempfile.TemporaryDirectory(prefix="longtake-") as folder:
        partial = Path(folder) / path.name
        partial.touch()
        yield partial
        with open(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as out, open(partial, "rb") as written:
            shutil.copyfileobj(written, out)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # What is not UTF-8 (a file name may be) becomes \udcXX, which is how JSON escapes it, too.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path | str, most: int = MOST_JSON, finite: bool = False) -> Any:
    """Read a JSON file of up to `most` bytes, each key once in its object. finite: refuse NaN and Infinity, too.

    Raises:
        LongtakeError: the file is missing.
        IntegrityError: it is not UTF-8, not JSON, or too large.
    """
    source = Path(path)
    try:
        if (size := source.stat().st_size) > most:
            what, got = f"is too large for a JSON file of this kind, {size} bytes", f"more than {most}"
        else:
            return json_value(source.read_text(encoding="utf-8"), finite)
    except FileNotFoundError:
        raise LongtakeError(f"{source} does not exist", fix="check the path") from None
    except UnicodeDecodeError as error:
        what, got = "is not UTF-8 text", str(error)
    except ValueError as error:
        what, got = "is not valid JSON", str(error)
    raise IntegrityError(f"{source} {what}", got=got, expected="a JSON file", fix="make it again, or restore it")


def json_value(text: str, finite: bool = True) -> Any:
    """What JSON `text` holds. Raises ValueError for what is none, for a key that is there twice, and for NaN if `finite`."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number if finite else None)
    except RecursionError:
        raise ValueError("thousands of nested brackets") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:40]!r} is there twice")
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def sha256(path: Path | str) -> str:
    """Hex SHA-256 digest of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while piece := source.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def require_folder(folder: Path | str) -> None:
    """Raise LongtakeError unless `folder` is one or can become one: before hours of work, not after."""
    for place in (Path(folder), *Path(folder).parents):
        if place.exists() and not place.is_dir():
            fix = "choose another place with --out"
            raise LongtakeError(f"{folder} cannot be a folder", got=f"{place} is a file", expected="a folder", fix=fix)


def require_disk(folder: Path | str, needed_bytes: int) -> None:
    """Raise LongtakeError unless the disk that holds `folder` has `needed_bytes` free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        what, got = f"not enough disk space for {folder}", f"{free / 1e9:.2f} GB free"
        expected, fix = f"at least {needed_bytes / 1e9:.2f} GB", "free some space or choose another folder"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
