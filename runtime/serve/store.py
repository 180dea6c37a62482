"""The folder in which sessions are kept: one folder a session, made and found by id."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Container, Iterator
from pathlib import Path

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import read_json, write_json
from longtake.runtime.serve.journal import Journal, Meta

FORMAT = 1
ID = re.compile(r"(video|live)_[0-9a-f]{16}")


def new_id(kind: str) -> str:
    """An id that nobody guesses. kind: "video" of a job, "live" of what is watched while it is made."""
    return f"{kind}_{secrets.token_hex(8)}"


class Store:
    """Sessions on disk. Whoever sees the folder sees the same sessions."""

    def __init__(self, root: Path) -> None:
        """Open `root`, making it if need be.

        Raises:
            LongtakeError: it cannot be written to.
            IntegrityError: another version of longtake made it.
        """
        self.root, self.sessions = root, root / "sessions"
        try:
            self.sessions.mkdir(parents=True, exist_ok=True)
            about = root / "store.json"
            if not about.exists():
                write_json(about, {"format": FORMAT})
            with tempfile.TemporaryFile(dir=self.sessions):
                pass
        except OSError as error:
            fix = "pass a folder that can be written to with --store"
            raise LongtakeError(f"the store {root} cannot be written to", got=error.strerror, fix=fix) from None
        if (found := read_json(about).get("format")) != FORMAT:
            fix = "pass another --store, or serve this one with the version that made it"
            got, wanted = f"format {found}", f"format {FORMAT}"
            raise IntegrityError(f"the store {root} is of another version", got=got, expected=wanted, fix=fix)

    def secret(self) -> bytes:
        """What tickets are signed with, the same for all who see this store."""
        path = self.root / "secret"
        with contextlib.suppress(FileExistsError):
            made = path.with_suffix(f".{secrets.token_hex(4)}")
            handle = os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(handle, "wb") as out:
                out.write(secrets.token_bytes(32))
            try:
                os.link(made, path)
            finally:
                made.unlink()
        return path.read_bytes()

    def folder(self, session: str) -> Path:
        """Where a session lies, whether or not there is one. Raises LongtakeError for what is no id."""
        if not ID.fullmatch(session):
            raise LongtakeError("this is no session", got=session[:40], expected="an id such as live_0123456789abcdef")
        return self.sessions / session

    def create(self, meta: Meta) -> Journal:
        """A new session; it exists from now on. Nothing of it is left if it cannot be kept."""
        try:
            return Journal.create(self.folder(meta.id), meta)
        except OSError:
            shutil.rmtree(self.folder(meta.id), ignore_errors=True)
            raise

    def journal(self, session: str) -> Journal:
        """A session that is there.

        Raises:
            LongtakeError: there is none of that id.
            IntegrityError: its description is damaged.
        """
        folder = self.folder(session)
        if not (folder / "meta.json").is_file():
            raise LongtakeError("there is no such session", got=session, fix="it may have expired: start a new one")
        return Journal(folder)

    def find(self, session: str) -> Journal | None:
        """The same; None if there is none."""
        try:
            return self.journal(session)
        except LongtakeError:
            return None

    def all(self) -> Iterator[Journal]:
        """Every session that can be read."""
        for folder in sorted(self.sessions.iterdir()):
            if ID.fullmatch(folder.name) and (journal := self.find(folder.name)):
                yield journal

    def remove(self, session: str) -> None:
        """Remove a session and all its files: first its description, so that nobody finds half of one."""
        folder = self.folder(session)
        (folder / "meta.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def expire(
        self, parked_s: float, kept_s: float, now: float | None = None, spared: Container[str] = ()
    ) -> list[str]:
        """Remove live sessions that nobody has touched for `parked_s`, jobs that ended `kept_s` ago, and folders that never
        became a session. spared: who waits or runs."""
        now, gone = time.time() if now is None else now, []
        for folder in list(self.sessions.iterdir()):
            with contextlib.suppress(OSError, LongtakeError):  # what cannot be read is kept
                if folder.name not in spared and self._late(folder, parked_s, kept_s, now):
                    self.remove(folder.name) if ID.fullmatch(folder.name) else None
                    gone.append(folder.name)
        return gone

    def _late(self, folder: Path, parked_s: float, kept_s: float, now: float) -> bool:
        if folder.name.startswith("video_") and (folder / "meta.json").exists():
            end = self.journal(folder.name).end()
            return end is not None and now > end["at"] + kept_s
        return now > folder.stat().st_mtime + parked_s

    def bytes_of(self, user: str) -> int:
        """What a user's sessions take on disk."""
        return sum(journal.bytes() for journal in self.all() if journal.meta.user == user)
