"""Chunks that are committed and handed over, but perhaps not decoded: how a session goes back to before one of them.

Going back to the newest one is like any other failed chunk: what its attempt wrote, nobody reads, and it is generated
again. An older one cannot be generated again, because the chunk after it has already written over a slot that it read.
So its latents are kept, and the next try decodes those.

Legend: F latent frames of a chunk, C channels, H, W sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from longtake.runtime.state import Position

KEPT = "kept."  # in front of the chunk's index, in a snapshot


@dataclass(frozen=True)
class HandedOver:
    """One chunk: the session's position before and after it, and its latents [1, F, C, H, W]."""

    before: Position
    after: Position
    latents: Tensor


class Undecoded:
    """The chunks in the order they were handed over. `kept`: latents of chunks that are not generated again, by index."""

    def __init__(self) -> None:
        self.chunks: tuple[HandedOver, ...] = ()
        self.kept: dict[int, Tensor] = {}

    @property
    def first_free(self) -> int:
        """The first chunk that live changes can still shape."""
        return max(self.kept, default=-1) + 1

    def add(self, chunk: HandedOver) -> None:
        """To be called before the position is committed."""
        self.chunks = (*self.chunks, chunk)

    def settle(self, decoded: int, position: Position) -> None:
        """Forget the chunks before number `decoded`, and those that were not committed after all."""
        if self.chunks or self.kept:
            waiting = (one for one in self.chunks if decoded < one.after.chunk <= position.chunk)
            self.chunks = tuple(waiting)
            self.kept = {index: latents for index, latents in self.kept.items() if index >= decoded}

    def position_before(self, index: int, now: Position) -> Position:
        """The position before chunk `index`, with what has been asked for since. Calling it again changes nothing."""
        undone = [one for one in self.chunks if index < one.after.chunk <= now.chunk]
        self.kept |= {one.before.chunk: one.latents for one in undone[:-1]}
        for one in reversed(undone):
            now = _before(one, now)
        return now

    def tensors(self) -> dict[str, Tensor]:
        """For a snapshot."""
        return {f"{KEPT}{index}": latents.detach().clone() for index, latents in self.kept.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin anew from a snapshot's tensors."""
        own = {name.removeprefix(KEPT): tensor for name, tensor in tensors.items() if name.startswith(KEPT)}
        self.chunks, self.kept = (), {int(index): tensor.clone() for index, tensor in own.items()}


def _before(chunk: HandedOver, now: Position) -> Position:
    """The position before a chunk, given the one that came of it: scripts only grow at their end, and live changes that
    came later are for later chunks."""
    appended = now.script[len(chunk.after.script) :]
    taken_up = tuple(edit for edit in chunk.before.edits if edit.at <= chunk.before.chunk)
    camera = chunk.before.camera and chunk.before.camera.taken_back(now.camera, chunk.before.chunk)
    edits = (*taken_up, *now.edits)
    return replace(chunk.before, script=(*chunk.before.script, *appended), edits=edits, camera=camera)
