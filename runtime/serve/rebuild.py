"""A session from its journal: the newest whole state that verifies, the chunks after it fed again, what was asked for since."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from longtake.errors import IntegrityError, LongtakeError
from longtake.record import record_from_json
from longtake.runtime.camera import camera_from_json, steer_from, steered
from longtake.runtime.clip import latents_from_clip
from longtake.runtime.generator import Generator
from longtake.runtime.retake import merged
from longtake.runtime.serve.journal import Journal
from longtake.runtime.session import Session
from longtake.runtime.session_options import Sampling
from longtake.runtime.snapshot import Identity, check_same, snapshot_from_file
from longtake.runtime.start import one_a_chunk
from longtake.runtime.state import Edit, Position, position_from_json, with_edit
from longtake.runtime.story import Segment, fit_segments
from longtake.runtime.view import View
from longtake.training.models.family import Marker
from longtake.training.models.sana_wm.actions import Pace

log = logging.getLogger(__name__)


class OtherEnginesError(LongtakeError):
    """The session was made with engines or options that these are not."""


def segments_of(script: Iterable[Iterable[Any]]) -> tuple[Segment, ...]:
    return tuple(Segment(str(prompt), int(chunks), bool(cut)) for prompt, chunks, cut in script)


@contextlib.contextmanager
def legible(journal: Journal) -> Iterator[None]:
    """Where what is kept of a session is read. Raises IntegrityError for what it cannot be."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fix = "resume its session, which makes damaged chunks again; or make the video anew"
        raise IntegrityError(f"what is kept of {journal.id} is damaged", got=repr(error)[:80], fix=fix) from error


def begun(generator: Generator, journal: Journal) -> Session:
    """The session before its first chunk.

    Raises:
        OtherEnginesError: it was begun with others.
    """
    meta = journal.meta
    sampling = Sampling(meta.steps, None, meta.shift, meta.guidance, meta.solver)
    if meta.timesteps:
        sampling = Sampling(None, meta.timesteps, meta.shift, meta.guidance, meta.solver)
    walks = "camera" in generator.model.family.can  # what it sees is told by its picture, also when it goes on
    image = journal.folder / meta.image if meta.image and (walks or not journal.count()) else None
    how = {"seed": meta.seed, "sampling": sampling, "negative_prompt": meta.negative_prompt, "endless": meta.endless}
    session = generator.session(segments_of(meta.script), image=image, view=View(**meta.view), **how)  # type: ignore[arg-type]
    if meta.identity:
        try:
            check_same(record_from_json(Identity, meta.identity), session.identity)
        except LongtakeError as error:
            session.close(discard=True)
            raise OtherEnginesError(error.what, got=error.got, expected=error.expected, fix=error.fix) from None
    else:
        journal.amend(identity=asdict(session.identity))
    return session


def position_kept(journal: Journal, index: int, marker: Callable[[Mapping[str, Any]], Marker]) -> Position:
    """The position that a chunk was kept with: where the session stood after it. `marker`: see `position_from_json`.

    Raises:
        IntegrityError: it is damaged.
    """
    with legible(journal):
        return position_from_json(journal.chunk(index)["position"], marker)


def asked_since(journal: Journal, position: Position) -> Position:
    """`position` with what was asked for live and is still to come: kept before it was acknowledged, so it counts."""
    edits: tuple[Edit, ...] = tuple(
        edit for edit in position.edits if journal.meta.parent and edit.at >= position.chunk
    )
    for event in journal.events():
        if event["type"] == "change" and event["at_chunk"] >= position.chunk:
            if event["prompt"] is not None or event["cut"]:
                edits = with_edit(edits, Edit(event["at_chunk"], event["prompt"], event["cut"]))
            if event.get("camera") and position.camera is not None:
                position = replace(position, camera=steered(position.camera, event["at_chunk"], **event["camera"])[0])
        if event["type"] == "extend":
            position = lengthened(position, event["total"])
    return replace(position, edits=edits)


def lengthened(position: Position, total: int) -> Position:
    """`position` with a script that ends after `total` chunks of the video, if it ended before."""
    missing = total - position.chunk - sum(segment.chunks for segment in position.script)
    if missing <= 0:
        return position
    prompt = position.script[-1].prompt if position.script else position.prompt
    return replace(position, script=(*position.script, Segment(prompt, missing)))


def rebuild(generator: Generator, journal: Journal) -> Session:
    """The session as its journal has it.

    Raises:
        OtherEnginesError: it was made with other engines.
        IntegrityError: its description is damaged. Damaged chunks are put aside with those after them, and made again.
    """
    marker = generator.model.family.marker
    count = journal.intact(journal.count(), lambda about: position_from_json(about["position"], marker))
    if count < journal.count():
        log.warning("session %s: chunk %d is damaged; it is made again from there", journal.id, count)
        journal.cut_back(count)
    session = begun(generator, journal)
    try:
        _restore(session, journal, count)
        for index in range(session.next_index, count):
            session.replay(journal.latents(index), position_kept(journal, index, marker))
        if count and session.next_index == count:
            session.adopt(asked_since(journal, position_kept(journal, count - 1, marker)))
        else:
            session.adopt(asked_since(journal, _first_position(session, journal)))
    except BaseException:
        session.close(discard=True)
        raise
    return session


def _first_position(session: Session, journal: Journal) -> Position:
    """Before the first chunk: the description's script, and of a retake the changes it began with."""
    edits = tuple(Edit(*entry) for entry in journal.meta.about.get("edits", ()))
    camera = session.position.camera
    if camera is not None:
        camera = camera_from_json({**camera.as_json(), "steers": journal.meta.about.get("steers", ())})
    return replace(session.position, edits=edits, camera=camera)


def steers_of(journal: Journal) -> list[dict[str, Any]]:
    """Every live change of the camera, as `CameraPosition.as_json` tells one; those of the video that it was taken from included."""
    steers, pace = list(journal.meta.about.get("steers", ())), Pace(fps=float(journal.meta.fps))
    for event in journal.events():
        if event["type"] == "change" and event.get("camera"):
            steers = [steer for steer in steers if steer["at"] < event["at_chunk"]]
            steers.append(asdict(steer_from(event["at_chunk"], pace, **event["camera"])))
    return steers


def _restore(session: Session, journal: Journal, count: int) -> None:
    """Take over the newest whole state that is not ahead of the chunks; one that is damaged, or another session's, is passed over."""
    for chunk, path in journal.snapshots(count):
        try:
            snapshot = snapshot_from_file(path)
            marker = session.model.family.marker
            _check_own(snapshot.position, position_kept(journal, chunk - 1, marker) if chunk else None)
            if journal.meta.parent and chunk <= journal.meta.from_chunk:  # a retake may have another seed from there on
                snapshot = replace(snapshot, identity=replace(snapshot.identity, seed=journal.meta.seed))
            session.restore(snapshot)
            return
        except LongtakeError as error:
            log.warning("session %s: the state before chunk %d is left out: %s", journal.id, chunk, error.what)


def _check_own(found: Position, kept: Position | None) -> None:
    """Raise IntegrityError for a state that stands elsewhere than the journal's chunk before it."""
    if kept is not None:
        got, expected = ((one.chunk, one.shot, one.prompt, one.slots) for one in (found, kept))
        if got != expected:
            raise IntegrityError("it is another session's", got=f"chunk {found.chunk}, {found.prompt[:60]!r}")


def take_in_clip(session: Session, journal: Journal) -> int:
    """Feed the uploaded clip that a session starts from, and keep its chunks; returns how many there are."""
    meta = journal.meta
    latents = latents_from_clip(journal.folder / str(meta.clip), session.model)
    preset = session.model.preset
    first, rest = latents.tensor_split([preset.frames_of(0)], dim=1)
    chunks = [first, *(rest.split(preset.chunk_latents, dim=1) if rest.shape[1] else ())]
    told = (Segment(meta.clip_prompt or meta.script[0][0]),)
    for index, (chunk, segment) in enumerate(zip(chunks, one_a_chunk(fit_segments(told, len(chunks))), strict=True)):
        session.feed(chunk, segment.prompt)
        journal.commit(
            index, {"position": session.position.as_json(), "prompt": segment.prompt, "cut": False}, chunk, b"", None
        )
    journal.amend(about={**meta.about, "first_media": len(chunks)})
    return len(chunks)


def script_from(journal: Journal, start: int, position: Position) -> tuple[Segment, ...]:
    """What a video shows from chunk `start` on: the chunks that were made, then what is left of its script."""
    made = (Segment(about["prompt"], 1, about["cut"]) for about in journal.chunks()[start:])
    return merged((*made, *position.script))
