"""Bringing a video's decoder back to before a chunk, so that a chunk whose decoding failed can be decoded again.

A decoder writes its feature caches in place. On a host they are a few megabytes and are copied before every chunk. On a
GPU they may be gigabytes (3.2 GB at 704x1280), and a second set would not fit: there nothing is copied, and going back
means to decode again what the caches depend on. That is a bounded number of latents, because each cache is the last
frames of what a causal convolution reads; from zeros, after as many latents every cache holds the same bits.

Legend: F latent frames of a chunk, C channels, H, W sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from longtake.runtime.video_model import Decoder

Decode = Callable[
    [Tensor], object
]  # a chunk's latents [1, F, C, H, W], on the decoder's own stream; frames are dropped


class Past(Protocol):
    """What is kept of a decoder's past."""

    def before(self, index: int) -> None:
        """Chunk `index` is about to be decoded."""
        ...

    def after(self, index: int, latents_BFCHW: Tensor) -> None:
        """It is decoded."""
        ...

    def rewind(self, index: int, decode: Decode) -> None:
        """Bring the decoder to where it was before chunk `index`, one of the latest."""
        ...

    def begin(self, tensors: list[Tensor]) -> None:
        """The decoder was given the state `tensors`; nothing earlier can be asked for."""
        ...


class CopiedPast:
    """The state before the latest chunk, copied into buffers that are allocated once."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._copies: list[Tensor] = []
        self._index, self._used = -1, 0

    def before(self, index: int) -> None:
        state = self.decoder.state()
        if state and len(self._copies) != len(state):
            self._copies = [tensor.detach().clone() for tensor in state]
        for copy, tensor in zip(self._copies, state):
            copy.copy_(tensor)
        self._index, self._used = index, len(state)

    def after(self, index: int, latents_BFCHW: Tensor) -> None: ...

    def rewind(self, index: int, decode: Decode) -> None:
        if self._index >= index:  # else nothing of that chunk was decoded
            self.decoder.load_state(self._copies[: self._used])

    def begin(self, tensors: list[Tensor]) -> None:
        self._index = -1


class ReplayedPast:
    """The latents that the state depends on. latents: how many that are at most."""

    def __init__(self, decoder: Decoder, latents: int) -> None:
        self.decoder, self.latents = decoder, latents
        self._base: list[Tensor] | None = []  # the state before the first chunk kept; None: it makes no difference
        self._chunks: deque[tuple[int, Tensor]] = deque()

    def before(self, index: int) -> None: ...

    def after(self, index: int, latents_BFCHW: Tensor) -> None:
        self._chunks.append((index, latents_BFCHW))
        # The latest one may be taken back: without it and the first there must be enough.
        while sum(chunk.shape[1] for _, chunk in list(self._chunks)[1:-1]) >= self.latents:
            self._chunks.popleft()
            self._base = None

    def rewind(self, index: int, decode: Decode) -> None:
        while self._chunks and self._chunks[-1][0] >= index:
            self._chunks.pop()
        if self._base is None:
            # Loaded, too: what ranks share, `state` gives as copies.
            self.decoder.load_state([tensor.zero_() for tensor in self.decoder.state()])
        else:
            self.decoder.load_state(self._base)
        for _, latents in self._chunks:
            decode(latents)

    def begin(self, tensors: list[Tensor]) -> None:
        self._base = list(tensors)
        self._chunks.clear()


def past_of(decoder: Decoder, latents: int | None) -> Past:
    """latents: how many the decoder's state depends on; None: copy its state instead."""
    return CopiedPast(decoder) if latents is None else ReplayedPast(decoder, latents)
