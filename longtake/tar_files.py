"""Files inside tar archives (webdataset shards), read in place: `shard.tar/000.mp4` is the path of one."""

from __future__ import annotations

import io
import os
import tarfile
from functools import lru_cache
from pathlib import Path

from longtake.errors import IntegrityError, LongtakeError

SUFFIX = ".tar"
Place = tuple[int, int]  # offset and size in bytes


class Part(io.RawIOBase):
    """Some bytes of a file, to be read and sought in."""

    def __init__(self, path: Path, place: Place) -> None:
        super().__init__()
        self._file, (self._begin, self._size), self._at = open(path, "rb"), place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._begin + self._at)
        found = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def tar_of(path: Path) -> Path | None:
    """The archive that `path` goes into; None for the path of a file of its own."""
    return next((parent for parent in path.parents if parent.suffix.lower() == SUFFIX and parent.is_file()), None)


def opened_member(path: Path) -> io.BufferedReader | None:
    """The file inside an archive that `path` names; None for the path of a file of its own.

    Raises:
        LongtakeError: the archive has no such file.
        IntegrityError: it is none, or ends early.
    """
    tar = tar_of(path)
    if tar is None:
        return None
    place = members(tar).get(path.relative_to(tar).as_posix())
    if place is None:
        raise LongtakeError(f"{path} does not exist", got=f"no such file in {tar.name}", fix="check the path")
    return io.BufferedReader(Part(tar, place), 1 << 16)


def members(tar: Path) -> dict[str, Place]:
    """Where each file of an archive lies in it."""
    status = tar.stat()
    return _members(tar, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _members(tar: Path, size: int, changed: int) -> dict[str, Place]:
    try:
        with tarfile.open(tar, "r:") as archive:
            found = [(one.name.removeprefix("./"), one.offset_data, one.size) for one in archive if one.isreg()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise IntegrityError(
            f"{tar} cannot be read",
            got=str(error),
            expected="a tar that is not compressed",
            fix="unpack it, or make it again",
        ) from None
    if any(offset + length > size for _, offset, length in found):
        raise IntegrityError(f"{tar} ends early", got=f"{size} bytes", expected="all of its files", fix="copy it again")
    return {name: (offset, length) for name, offset, length in found}
