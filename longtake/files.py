"""Files that are either whole or absent: atomic writes, digests, disk space."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longtake.errors import IntegrityError, LongtakeError


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, else deleted.

    Any exception, Ctrl-C included, leaves whatever stood under `path` before untouched.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.stem}.", suffix=f".tmp{final.suffix}")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # What is not UTF-8 (a file name may be) becomes \udcXX, which is how JSON escapes it, too.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        LongtakeError: the file is missing.
        IntegrityError: it is not UTF-8 or not JSON.
    """
    source = Path(path)
    try:
        return json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LongtakeError(f"{source} does not exist", fix="check the path") from None
    except UnicodeDecodeError as error:
        what, got = "is not UTF-8 text", str(error)
    except json.JSONDecodeError as error:
        what, got = "is not valid JSON", str(error)
    except RecursionError:
        what, got = "is not valid JSON", "thousands of nested brackets"
    raise IntegrityError(f"{source} {what}", got=got, expected="a JSON file", fix="make it again, or restore it")


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
            raise LongtakeError(f"{folder} cannot be a folder", got=f"{place} is a file", expected="a folder",
                                fix="choose another place with --out")  # fmt: skip


def require_disk(folder: Path | str, needed_bytes: int) -> None:
    """Raise LongtakeError unless the disk that holds `folder` has `needed_bytes` free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise LongtakeError(
            f"not enough disk space for {folder}",
            got=f"{free / 1e9:.2f} GB free",
            expected=f"at least {needed_bytes / 1e9:.2f} GB",
            fix="free some space or choose another folder",
        )
