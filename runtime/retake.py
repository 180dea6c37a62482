"""Retakes: a video again from one of its chunks on, sharing what was before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from longtake.errors import LongtakeError
from longtake.record import whole_number
from longtake.runtime.camera import CameraPosition, steers_from
from longtake.runtime.state import Position
from longtake.runtime.story import Segment
from longtake.training.models.family import Marker


@dataclass(frozen=True)
class Take:
    """A chunk that was made. latents: fp32 [1, F, C, H, W] on the host. segment: its prompt, and whether it began a shot.
    camera: where it stood before the chunk."""

    latents: Tensor
    segment: Segment
    shot: int
    slots: Marker
    camera: CameraPosition | None = None


def merged(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Segments with neighbours of one prompt in one, so that a live change lasts as long as it would have then."""
    script: list[Segment] = []
    for one in segments:
        if script and script[-1].prompt == one.prompt and not one.cut:
            script[-1] = replace(script[-1], chunks=script[-1].chunks + one.chunks)
        else:
            script.append(one)
    return tuple(script)


def checked_start(from_chunk: int, chunks: int) -> int:
    """`from_chunk` if it is one of `chunks` chunks, or the one after them. Raises LongtakeError."""
    start = whole_number(from_chunk, "chunk to retake from", "pass 0 for all of it")
    if not 0 <= start <= chunks:
        what, got = "there is no such chunk to retake from", start
        expected, fix = f"0 to {chunks}", "pass a chunk that was made"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return start


def retaken(session: Any, takes: Sequence[Take] | None, first: Tensor | None, from_chunk: int, seed: int | None) -> Any:
    """See `Session.retake`. first: the latent of the picture that the video starts from."""
    if takes is None or len(takes) < session.position.chunk:  # more: the newest were not decoded, and are made again
        raise LongtakeError(
            "this session keeps no chunks to go back to",
            got="a session made without retakes=True",
            expected="one that kept every chunk since its beginning",
            fix="start it with generator.session(..., retakes=True)",
        )
    position = session.position
    takes = takes[: position.chunk]
    start = checked_start(from_chunk, len(takes))
    script = merged((*(take.segment for take in takes[start:]), *position.script))
    options = session.options if seed is None else replace(session.options, seed=seed)
    cameras = [*(take.camera for take in takes), position.camera]
    again = type(session)(session.model, session.tokenize, script, options, first, session.inputs, camera=cameras[0])
    try:
        for index, take in enumerate(takes[:start]):
            ahead = Position(script, take.slots, index + 1, take.shot, take.segment.prompt, camera=cameras[index + 1])
            again.replay(take.latents, ahead)
        camera = again.position.camera and replace(again.position.camera, steers=steers_from(cameras, start))
        again.adopt(replace(again.position, edits=position.edits, camera=camera))
    except BaseException:
        again.close(discard=True)
        raise
    return again
