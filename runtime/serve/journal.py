"""A session on disk, chunk by chunk: what makes that nothing is lost when a process dies. It knows no network.

A chunk is there once its `n.json` is, which is written last. A live change is on disk before it is acknowledged. Files that
carry a chunk's bytes bear the epoch of who wrote them, so that one who lost the session cannot overwrite what another keeps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import atomic_path, read_json, write_json
from longtake.record import Kind

KIND = Kind("a session's description", "`longtake serve`", "start a new session")
NEEDED: dict[str, dict[str, type]] = {"change": {"at_chunk": int, "cut": bool}, "extend": {"total": int}}  # of events
END, META, EVENTS, LEASE, INIT = "end.json", "meta.json", "events.jsonl", "lease.json", "init.mp4"


class LeaseLostError(LongtakeError):
    """Another worker has the session by now."""


@dataclass(frozen=True)
class Meta:
    """What a session is. script: [prompt, chunks, cut] each. frames: of the whole film if that is known; its last chunk is cut to them.

    identity: what its engines have to be, see `snapshot.Identity`. image, clip: names of files beside this one that it starts
    from. first_media: the first chunk that is shown; those before it are of an uploaded clip. parent, from_chunk: of a retake.
    view: where the camera goes, of a model with one: fields of `view.View`.
    """

    id: str
    kind: str
    user: str
    created: float
    model: str
    script: tuple[tuple[Any, ...], ...]
    seed: int
    steps: int
    guidance: float
    negative_prompt: str
    shift: float
    solver: str
    width: int
    height: int
    fps: int
    codec: str
    encoder: str
    timesteps: tuple[float, ...] = ()
    endless: bool = False
    frames: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    clip: str | None = None
    clip_prompt: str | None = None
    parent: str | None = None
    from_chunk: int = 0
    remixed_from: str | None = None
    flow: dict[str, Any] = field(default_factory=dict)
    view: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """Chunks of the whole film, without what was added later."""
        return int(self.about.get("total") or sum(int(entry[1]) for entry in self.script))


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    """An event that has what its type needs. Raises KeyError or TypeError for another."""
    for key, kind in NEEDED.get(event["type"], {}).items():
        if not isinstance(event[key], kind):
            raise TypeError(f"{event['type']}: {key} is {event[key]!r}")
    return {"prompt": None, **event}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fsynced(path: Path, data: bytes) -> None:
    """Write a file whole: under another name, then renamed."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


class Journal:
    """One session's folder. `epoch`: of the lease that its writer holds; readers have none."""

    def __init__(self, folder: Path, epoch: int = 0) -> None:
        self.folder, self.epoch = folder, epoch
        self.meta = KIND.read(Meta, folder / META)
        self._known = 0

    @classmethod
    def create(cls, folder: Path, meta: Meta) -> Journal:
        """Begin a session; its folder may hold the picture or clip that it starts from already."""
        folder.mkdir(parents=True, exist_ok=True)
        KIND.write(meta, folder / META)
        return cls(folder)

    @property
    def id(self) -> str:
        return self.folder.name

    def amend(self, **fields: Any) -> None:
        """Change the description."""
        self.meta = replace(self.meta, **fields)
        KIND.write(self.meta, self.folder / META)

    # ---- the lease -----------------------------------------------------------------------------------------------

    def leased(self) -> int:
        """The epoch of the newest lease; 0 if there was none. Raises IntegrityError if its file is damaged."""
        path = self.folder / LEASE
        try:
            return int(read_json(path)["epoch"]) if path.exists() else 0
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} is no lease", got=repr(error)[:80]) from None

    def take(self, epoch: int, worker: str) -> None:
        """Become the session's only writer. Raises LeaseLostError if a later lease is known."""
        if self.leased() > epoch:
            raise self._lost()
        write_json(self.folder / LEASE, {"epoch": epoch, "worker": worker})
        self.epoch = epoch
        self._drop_torn_line()

    def require_lease(self) -> None:
        """Raise LeaseLostError unless this is the newest lease."""
        if self.leased() != self.epoch:
            raise self._lost()

    def _lost(self) -> LeaseLostError:
        got, wanted = f"lease {self.epoch}", f"lease {self.leased()}"
        return LeaseLostError("another worker has this session", got=got, expected=wanted, fix="drop it")

    # ---- live changes --------------------------------------------------------------------------------------------

    def events(self) -> list[dict[str, Any]]:
        """What was asked for live, in order; a line that was never finished was never acknowledged, and does not count.

        Raises:
            IntegrityError: a finished line is damaged.
        """
        path = self.folder / EVENTS
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        try:
            return [_checked({**json.loads(line)}) for line in whole.splitlines() if line]
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} is damaged", got=str(error)[:80], fix="start a new session") from None

    def append_event(self, event: dict[str, Any]) -> None:
        """Keep an event; it is on disk when this returns."""
        self.require_lease()
        line = json.dumps({"ts": time.time(), **event}, ensure_ascii=True) + "\n"
        with open(self.folder / EVENTS, "ab", buffering=0) as out:
            before = out.tell()
            try:
                out.write(line.encode())
                os.fsync(out.fileno())
                self.touch()
            except OSError:
                with contextlib.suppress(OSError):
                    out.truncate(before)
                raise

    def _drop_torn_line(self) -> None:
        path = self.folder / EVENTS
        if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            with open(path, "r+b") as out:
                out.truncate(len(data.rpartition(b"\n")[0]) + (b"\n" in data))

    # ---- chunks --------------------------------------------------------------------------------------------------

    def count(self) -> int:
        """Chunks that are there, from the first one on; any thread may ask. Fewer than before if damaged ones were put aside."""
        known = self._known
        while known and not self._path(known - 1).exists():
            known -= 1
        while self._path(known).exists():
            known += 1
        self._known = known
        return known

    def chunk(self, index: int) -> dict[str, Any]:
        """What is known of a chunk. Raises IntegrityError if its file is damaged."""
        given = read_json(self._path(index))
        if not isinstance(given, dict) or given.get("chunk") != index or not isinstance(given.get("prompt"), str):
            raise IntegrityError(f"{self._path(index)} is not chunk {index}", fix="it is made again on resuming")
        return given

    def chunks(self) -> list[dict[str, Any]]:
        return [self.chunk(index) for index in range(self.count())]

    def commit(self, index: int, about: dict[str, Any], latents: Tensor, init: bytes, media: bytes | None) -> int:
        """Keep a chunk; returns the bytes it took. Nothing of it is there unless all is.

        Raises:
            LeaseLostError: another worker has the session, or has made this chunk.
            OSError: the disk is full, or gone.
        """
        self.require_lease()
        stem = f"{index:06}.e{self.epoch}"
        kept = save({"latents": latents.detach().to("cpu").contiguous()})
        fsynced(self.folder / f"{stem}.latents", kept)
        about = {
            **about,
            "chunk": index,
            "epoch": self.epoch,
            "latents": f"{stem}.latents",
            "latents_sha256": digest(kept),
        }
        if media is not None:
            fsynced(self.folder / f"{stem}.m4s", media)
            about |= {"media": f"{stem}.m4s", "media_sha256": digest(media), "media_bytes": len(media)}
            if not (self.folder / INIT).exists():
                fsynced(self.folder / INIT, init)
        text = (json.dumps(about, ensure_ascii=True) + "\n").encode()
        part = self.folder / f".{stem}.json"
        part.write_bytes(text)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        try:
            os.link(part, self._path(index))  # which fails if the name is taken
        except FileExistsError:
            raise self._lost() from None
        finally:
            part.unlink(missing_ok=True)
        return len(kept) + len(media or b"") + len(text)

    def media(self, index: int) -> bytes:
        """A chunk's fragment; empty of one that is not shown."""
        name = self.chunk(index).get("media")
        return (self.folder / name).read_bytes() if name else b""

    def init(self) -> bytes:
        """What comes before the first fragment of a stream."""
        return (self.folder / INIT).read_bytes()

    def latents(self, index: int) -> Tensor:
        """A chunk's latents, fp32 [1, F, C, H, W].

        Raises:
            IntegrityError: they are not what was kept.
        """
        data = self._verified(self.chunk(index), "latents")
        try:
            return load(data)["latents"].to(torch.float32)
        except (SafetensorError, KeyError) as error:
            raise IntegrityError(f"the latents of chunk {index} are damaged", got=str(error)[:80]) from None

    def _verified(self, about: dict[str, Any], what: str) -> bytes:
        path = self.folder / about[what]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read", got=error.strerror) from None
        if digest(data) != about[f"{what}_sha256"]:
            fix = "the chunk is made again on resuming"
            raise IntegrityError(f"{path} was altered", got="another digest", expected="the one kept with it", fix=fix)
        return data

    def intact(self, most: int, readable: Callable[[dict[str, Any]], object] = lambda about: None) -> int:
        """How many of the first `most` chunks are as they were written. readable: raises where what is told of one is not."""
        for index in range(most):
            try:
                about = self.chunk(index)
                self._verified(about, "latents")
                if about.get("media"):
                    self._verified(about, "media")
                readable(about)
            except (LongtakeError, KeyError, TypeError, ValueError):
                return index
        return most

    def cut_back(self, count: int) -> None:
        """Put the chunks from `count` on aside, because one of them is damaged."""
        index = count
        while self._path(index).exists():
            os.replace(self._path(index), self.folder / f"{index:06}.broken")
            index += 1
        self._known = min(self._known, count)
        self.keep_snapshots()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06}.json"

    def snapshot_path(self, chunk: int) -> Path:
        return self.folder / f"state-{chunk:06}.safetensors"

    def snapshots(self, most: float = float("inf")) -> list[tuple[int, Path]]:
        """Whole states by the chunk that comes next, the newest first; none ahead of chunk `most`."""
        found = [(int(path.stem.split("-")[1]), path) for path in self.folder.glob("state-*.safetensors")]
        return sorted((one for one in found if one[0] <= most), reverse=True)

    def keep_snapshots(self) -> None:
        """Remove whole states that are ahead of the chunks, and of the others all but the newest."""
        found, newest = self.snapshots(), self.snapshots(self.count())[:1]
        for _, path in (one for one in found if one not in newest):
            path.unlink(missing_ok=True)

    def end(self) -> dict[str, Any] | None:
        """How it ended: {"state", "reason", "code", "at"}; None as long as it can go on. Failed, if its file is damaged."""
        path = self.folder / END
        if not path.exists():
            return None
        try:
            given = read_json(path)
            return {**{key: str(given[key]) for key in ("state", "reason", "code")}, "at": float(given["at"])}
        except (IntegrityError, KeyError, TypeError, ValueError):
            about = {"state": "failed", "reason": "how it ended cannot be read", "code": "end_damaged"}
            return {**about, "at": path.stat().st_mtime}

    def finish(self, state: str, reason: str = "", code: str = "") -> None:
        """Say that it is over: "done", "stopped" or "failed"."""
        about = {"state": state, "reason": reason, "code": code, "at": time.time(), "chunks": self.count()}
        write_json(self.folder / END, about)

    def touch(self) -> None:
        """Somebody uses it: it expires later. A file that grows does not say so of its folder."""
        os.utime(self.folder)

    def reopen(self) -> None:
        """It goes on after all."""
        (self.folder / END).unlink(missing_ok=True)

    def bytes(self) -> int:
        """What it takes on disk, shared files included."""
        total = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as files:
            for one in files:
                with contextlib.suppress(FileNotFoundError):
                    total += one.stat().st_size
        return total
