"""Streaming VAE decode in a thread of its own, behind the generator by a bounded queue.

Legend: F latent frames of a chunk, C channels, H, W sizes, T video frames.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from longtake.runtime.backends.base import Decoder
from longtake.runtime.errors import LongtakeError

log = logging.getLogger(__name__)

QUEUE_LENGTH = 1  # chunks waiting; with the one being decoded, the generator is at most two chunks ahead


class Frames:
    """Frames of one chunk, perhaps still being decoded. finished_at is on time.perf_counter's clock."""

    def __init__(self, index: int) -> None:
        self.index, self.milliseconds, self.finished_at = index, 0.0, 0.0
        self._done = threading.Event()
        self._frames: np.ndarray | None = None
        self._error: BaseException | None = None

    @property
    def ready(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """Wait until decoding has succeeded or failed."""
        self._done.wait()

    def result(self) -> np.ndarray:
        """Wait for the frames: uint8 [T, H, W, 3]. Raises what the decoder raised."""
        self.wait()
        if self._frames is None:
            raise self._error or LongtakeError(f"chunk {self.index} was not decoded", fix="decode it again")
        return self._frames

    def settle(self, frames: np.ndarray | None, error: BaseException | None, milliseconds: float) -> None:
        """Called once by the decode thread."""
        self._frames, self._error, self.milliseconds = frames, error, milliseconds
        self.finished_at = time.perf_counter()
        self._done.set()


class DecodeQueue:
    """Decodes chunks in the order they come. `submit` blocks while the queue is full: that is the back-pressure.

    An error belongs to the chunk it hit, and to all later ones: the decoder's state no longer fits them. It is raised
    in the caller's thread, by `Frames.result` or by the next `submit`; `load_state` makes the queue usable again.
    """

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self.decoder, self.device = decoder, device
        self._jobs: queue.Queue[tuple[Frames, Tensor, torch.cuda.Event | None] | None] = queue.Queue(QUEUE_LENGTH)
        self._error: BaseException | None = None
        self._last: Frames | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="longtake-decode", daemon=True)
        self._thread.start()

    def submit(self, index: int, latents_BFCHW: Tensor) -> Frames:
        """Queue chunk `index`, fp32 [1, F, C, H, W]; asking again for the last one returns the same frames."""
        if self._last is not None and self._last.index == index:
            return self._last
        self.raise_error()
        ready = None
        if self._stream is not None:
            # The latents are written on the generator's stream: decoding must wait for this point of it.
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))
        frames = Frames(index)
        self._jobs.put((frames, latents_BFCHW, ready))
        self._last = frames
        return frames

    def raise_error(self) -> None:
        """Raise the error that broke decoding, if one did."""
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Wait until everything submitted is decoded; raises a decode error."""
        if self._last is not None:
            self._last.result()

    def state(self) -> list[Tensor]:
        """The decoder's feature caches, copied, after everything submitted."""
        self.drain()
        return [tensor.detach().clone() for tensor in self.decoder.state()]

    def load_state(self, tensors: list[Tensor]) -> None:
        """Continue from `tensors` (see Decoder.load_state); forgets an earlier error."""
        if self._last is not None:
            self._last.wait()
        # Copied on the caller's stream, after the decode thread's last use and before the event of the next `submit`.
        self.decoder.load_state(tensors)
        self._error = self._last = None

    def close(self) -> None:
        """Finish what is queued and end the thread. Calling it twice is harmless."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            frames, latents, ready = job
            start = time.perf_counter()
            result: np.ndarray | None = None
            if self._error is None:
                try:
                    result = self._decode(latents, ready)
                except BaseException as error:  # noqa: BLE001  (it is raised again in the caller's thread)
                    log.debug("decoding chunk %d failed", frames.index, exc_info=True)
                    self._error = error
            frames.settle(result, self._error, 1e3 * (time.perf_counter() - start))
            del job, latents

    @torch.no_grad()
    def _decode(self, latents_BFCHW: Tensor, ready: torch.cuda.Event | None) -> np.ndarray:
        with self._on_own_stream(latents_BFCHW, ready):
            parts = [_as_bytes(self.decoder.decode(latent.contiguous())) for latent in latents_BFCHW.unbind(1)]
            # The copy to the host waits for the decode stream, so whoever waits for the frames needs no event.
            return torch.cat(parts).contiguous().cpu().numpy()

    @contextlib.contextmanager
    def _on_own_stream(self, latents: Tensor, ready: torch.cuda.Event | None) -> Iterator[None]:
        if self._stream is None or ready is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            # Freed by the caller while still being read here: the allocator must not hand the block out before.
            latents.record_stream(self._stream)
            yield


def _as_bytes(frames_CTHW: Tensor) -> Tensor:
    """[-1, 1] fp32 [3, T, H, W] to uint8 [T, H, W, 3]."""
    return frames_CTHW.mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
