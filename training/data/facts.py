"""What was found out about clips, so that it needn't be found out again: digests, and how much of each can be decoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from longtake.errors import LongtakeError
from longtake.files import read_json, sha256, write_json
from longtake.tar_files import opened_member, tar_of

MOST_BYTES = 1 << 30  # of a million clips
Stamp = tuple[int, int]  # size in bytes, time of the last change in ns: another one means another file


@dataclass
class Facts:
    """By path: (stamp, sha256) of clips, and (stamp, usable frames, reason) of those that turned out broken or short."""

    digests: dict[str, tuple[Stamp, str]] = field(default_factory=dict)
    short: dict[str, tuple[Stamp, int, str]] = field(default_factory=dict)

    def digest(self, path: Path) -> str:
        """SHA-256 of a clip's file."""
        stamp, known = stamp_of(path), self.digests.get(str(path))
        if known is None or known[0] != stamp:
            known = self.digests[str(path)] = stamp, _digest(path)
        return known[1]

    def note_short(self, path: Path, frames: int, reason: str) -> None:
        """Only the first `frames` frames of a clip can be used."""
        self.short[str(path)] = stamp_of(path), frames, reason

    def require(self, path: Path, frames: int) -> None:
        """Raise LongtakeError if it is known that fewer than `frames` frames of a clip can be used."""
        known = self.short.get(str(path))
        if known is not None and known[1] < frames and known[0] == stamp_of(path):
            raise LongtakeError(known[2])

    def merge(self, other: Facts) -> None:
        """Take over what another process found out."""
        self.digests |= other.digests
        self.short |= other.short

    def save(self, path: Path) -> None:
        """Write to a JSON file."""
        write_json(path, {"digests": self.digests, "short": self.short})


def facts_from_file(path: Path) -> Facts:
    """Facts saved before; none if there is no such file, or a damaged one: they are only saved time."""
    try:
        content = read_json(path, most=MOST_BYTES)
        digests = {k: (_stamp(s), str(digest)) for k, (s, digest) in content["digests"].items()}
        short = {k: (_stamp(s), int(frames), str(why)) for k, (s, frames, why) in content["short"].items()}
    except (LongtakeError, KeyError, TypeError, ValueError, AttributeError):
        return Facts()
    return Facts(digests, short)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of one inside a tar."""
    member = opened_member(path)
    if member is None:
        return sha256(path)
    found = hashlib.sha256()
    with member:
        while part := member.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def stamp_of(path: Path) -> Stamp:
    """Size and time of the last change; zeros if the file is gone."""
    try:
        status = (tar_of(path) or path).stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _stamp(value: list[int]) -> Stamp:
    size, time = value
    return int(size), int(time)
