"""Retakes, snapshots and continuations on disk: a new session that shares another one's chunks up to a point.

Shared files are hard links, so that either session may be removed. What follows the point is described anew: the same script
and the same changes, unless another prompt, cut, story, seed or length is wished for.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longtake.errors import IntegrityError, LongtakeError
from longtake.runtime.retake import checked_start
from longtake.runtime.serve.journal import INIT, Journal, Meta, fsynced
from longtake.runtime.serve.rebuild import (
    asked_since,
    legible,
    lengthened,
    position_kept,
    script_from,
    segments_of,
    steers_of,
)
from longtake.runtime.serve.store import Store
from longtake.runtime.state import Edit, Position, position_from_json
from longtake.runtime.story import Segment


@dataclass(frozen=True)
class Wish:
    """What is to be different from chunk `from_chunk` on; None, and a cut of False, leave things as they were.

    chunks, frames: a new length of the whole film. bounded: an endless one is to end where it did.
    """

    from_chunk: int
    prompt: str | None = None
    cut: bool = False
    story: tuple[Segment, ...] | None = None
    seed: int | None = None
    chunks: int | None = None
    frames: int | None = None
    bounded: bool = False
    kind: str = "live"
    remixed_from: str | None = None


@dataclass(frozen=True)
class KeptSlots:
    """The slots of a position as they stand in a file: carried over, not understood."""

    given: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return dict(self.given)

    def plan(self, cut: bool) -> Any:
        raise LongtakeError("a position on disk plans nothing", fix="rebuild the session")


@dataclass(frozen=True)
class Ahead:
    """What a session has before it. steers: of the camera, as JSON."""

    script: tuple[Segment, ...]
    edits: tuple[Edit, ...] = ()
    steers: tuple[dict[str, Any], ...] = ()

    @property
    def rows(self) -> list[list[Any]]:
        """The changes, as JSON."""
        return [[edit.at, edit.prompt, edit.cut] for edit in self.edits]

    def position(self, kept: dict[str, Any], chunk: int) -> dict[str, Any]:
        """A position after chunk `chunk`, as it is kept, with this before it."""
        script = [[one.prompt, one.chunks, one.cut] for one in self.script]
        if kept.get("camera"):
            held = [steer for steer in kept["camera"]["steers"] if steer["at"] <= chunk]
            kept = {**kept, "camera": {**kept["camera"], "steers": [*held, *self.steers]}}
        return {**kept, "script": script, "edits": self.rows}


def position_on_disk(journal: Journal, count: int) -> Position:
    """Where a session stood after `count` chunks, with what was asked for since. Raises IntegrityError if it is damaged."""
    if count:
        position = position_kept(journal, count - 1, KeptSlots)
    else:
        edits = tuple(Edit(*entry) for entry in journal.meta.about.get("edits", ()))
        position = Position(segments_of(journal.meta.script), KeptSlots({}), edits=edits)
    return asked_since(journal, position)


def fork(store: Store, source: Journal, ident: str, user: str, wish: Wish) -> Journal:
    """A new session that shares the chunks of `source` before `wish.from_chunk`.

    Raises:
        LongtakeError: there is no such chunk.
        IntegrityError: what it needs of `source` is damaged.
    """
    with legible(source):
        return _forked(store, source, ident, user, wish)


def _forked(store: Store, source: Journal, ident: str, user: str, wish: Wish) -> Journal:
    count = source.count()
    start = checked_start(wish.from_chunk, count)
    first_media = int(source.meta.about.get("first_media", 0))
    if source.meta.clip and start < first_media:
        raise LongtakeError("the clip itself cannot be taken again", got=start, expected=f"{first_media} or more")
    shared = _shared(source, start, wish)  # its last chunk was cut short: it is made again, whole, with the same result
    good = source.intact(shared, lambda about: position_from_json(about["position"], KeptSlots))
    if good < shared:
        raise IntegrityError(f"chunk {good} of {source.id} is damaged")  # for the log: clients are told what helps
    ahead = _ahead(source, count, shared, wish)
    longer = any(event["type"] == "extend" for event in source.events())  # then its length in frames holds no more
    meta = _described(replace(source.meta, frames=None) if longer else source.meta, ident, user, wish, shared, ahead)
    before = [steer for steer in steers_of(source) if steer["at"] < shared]  # a take of this take may begin before them
    meta = replace(meta, about={**meta.about, "steers": [*before, *ahead.steers]})
    folder = store.folder(ident)
    folder.mkdir(parents=True)
    try:
        return _shared_into(folder, source, shared, ahead, meta)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _shared_into(folder: Path, source: Journal, shared: int, ahead: Ahead, meta: Meta) -> Journal:
    for index in range(shared):
        _share_chunk(source, folder, index, ahead if index == shared - 1 else None)
    for name in (INIT, source.meta.image, source.meta.clip):
        if name and (source.folder / name).exists():
            _link(source.folder / name, folder / name)
    for _, path in source.snapshots(shared)[:1]:
        with contextlib.suppress(FileNotFoundError):  # a newer one takes its place: the chunks will do
            _link(path, folder / path.name)
    return Journal.create(folder, meta)


def _ahead(source: Journal, count: int, start: int, wish: Wish) -> Ahead:
    """Script and live changes from chunk `start` on."""
    position = position_on_disk(source, count)
    steers = tuple(steer for steer in steers_of(source) if steer["at"] >= start)
    if wish.story is not None:
        return Ahead(
            wish.story, steers=steers if wish.remixed_from else ()
        )  # a remix has other words, and the same moves
    script = script_from(source, start, position)
    if wish.bounded and source.meta.endless:
        script = tuple(one for one in script_from(source, start, replace(position, script=())))
    edits = list(position.edits)
    if wish.prompt is not None or wish.cut:
        edits = sorted([*edits, Edit(wish.from_chunk, wish.prompt, wish.cut)], key=lambda edit: edit.at)
    if wish.chunks is not None:
        script = lengthened(replace(position, chunk=start, script=script), wish.chunks).script
    return Ahead(script, tuple(edits), steers)


def _shared(source: Journal, start: int, wish: Wish) -> int:
    """How many chunks can be shared: not the last one, if it was cut short and the film goes on."""
    if start and (about := source.chunk(start - 1)).get("frames", 0) < about.get("whole_frames", 0):
        if wish.chunks is not None or wish.story is not None:
            return start - 1
    return start


def _described(meta: Meta, ident: str, user: str, wish: Wish, shared: int, ahead: Ahead) -> Meta:
    seed = meta.seed if wish.seed is None else wish.seed
    frames = wish.frames if wish.chunks is not None else meta.frames if wish.story is None else None
    about = {**meta.about, "edits": ahead.rows}
    told = meta.script if shared else tuple((one.prompt, one.chunks, one.cut) for one in ahead.script)
    return replace(
        meta,
        id=ident,
        user=user,
        kind=wish.kind,
        created=time.time(),
        script=told,
        seed=seed,
        frames=frames,
        parent=meta.id,
        from_chunk=wish.from_chunk,
        identity={**meta.identity, "seed": seed} if meta.identity else {},
        about={**about, "total": shared + sum(one.chunks for one in ahead.script)},
        endless=meta.endless and not wish.bounded and wish.story is None,
        remixed_from=wish.remixed_from,
    )


def _share_chunk(source: Journal, folder: Path, index: int, ahead: Ahead | None) -> None:
    """Share one chunk. ahead: what follows it now, if it is the last one shared."""
    about = source.chunk(index)
    for name in (about["latents"], about.get("media")):
        if name:
            _link(source.folder / name, folder / name)
    if ahead is None:
        _link(source.folder / f"{index:06}.json", folder / f"{index:06}.json")
        return
    position = ahead.position(about["position"], index)
    fsynced(folder / f"{index:06}.json", json.dumps({**about, "position": position}).encode())


def _link(source: Path, target: Path) -> None:
    """One file under two names; a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        with contextlib.suppress(FileExistsError):
            shutil.copyfile(source, target)
