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
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longtake.cuda_streams import acquire_stream
from longtake.errors import LongtakeError
from longtake.runtime.frames import HostRing, Staging
from longtake.runtime.rewind import Past, past_of
from longtake.runtime.video_model import Decoder, NetworkDecoder, VideoModel
from longtake.training.models.presets import Preset

log = logging.getLogger(__name__)

QUEUE_LENGTH = 1  # chunks waiting; with the one being decoded, the generator is at most two chunks ahead


class Frames:
    """Frames of one chunk, perhaps still being decoded. finished_at is on time.perf_counter's clock."""

    def __init__(self, index: int) -> None:
        self.index, self.milliseconds, self.finished_at = index, 0.0, 0.0
        self.told = False  # whether its error was raised to somebody
        self._done = threading.Event()
        self._frames: np.ndarray | None = None
        self._error: BaseException | None = None

    @property
    def error(self) -> BaseException | None:
        """What the decoder raised, once it has."""
        return self._error

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
            self.raise_error()
            raise LongtakeError(f"chunk {self.index} was not decoded", fix="decode it again")
        return self._frames

    def raise_error(self) -> None:
        """Raise what the decoder raised, if it did."""
        if self._error is not None:
            self.told = True
            raise self._error

    def settle(self, frames: np.ndarray | None, error: BaseException | None, milliseconds: float) -> None:
        """Called once by the decode thread."""
        self._frames, self._error, self.milliseconds = frames, error, milliseconds
        self.finished_at = time.perf_counter()
        self._done.set()


def decode_queue(model: VideoModel) -> DecodeQueue:
    """A queue at the start of a video. Raises LongtakeError if there is no VAE."""
    decoder = model.decoder()
    past = decoder.past_latents if isinstance(decoder, NetworkDecoder) else None
    return DecodeQueue(decoder, model.preset, model.device, model.backend.decode_device, past)


class DecodeQueue:
    """Decodes chunks in the order they come. `submit` blocks while the queue is full: that is the back-pressure.

    An error belongs to the chunk it hit, and to all later ones: the decoder's state no longer fits them. It is raised
    in the caller's thread, by `Frames.result` or by the next `submit`; `rewind` and `load_state` make the queue usable
    again. decoded: the chunks before this number are. failed: the first chunk that could not be.

    Three streams: the generator's writes the latents, one of our own decodes them, one more copies the frames out.
    The decoder may be on another GPU than the generator; the latents are then copied over first.
    """

    def __init__(
        self,
        decoder: Decoder,
        preset: Preset,
        source: torch.device,
        device: torch.device | None = None,
        past_latents: int | None = None,
    ) -> None:
        """`source`: where the latents come from. `device`: the decoder's, the same if None. `past_latents`: see
        `rewind.past_of`."""
        self.decoder, self.source, self.device = decoder, source, device or source
        frames = preset.vae.stride[0]
        pixels = (preset.height, preset.width, 3)
        self._most = max(preset.frames_of(0), preset.chunk_latents)
        self._ring = HostRing((frames * self._most, *pixels), pinned=self.device.type == "cuda")
        self._staging = Staging(self.device, (frames, *pixels))
        self._jobs: queue.Queue[tuple[Frames, Tensor | None, torch.cuda.Event | None] | None] = queue.Queue(
            QUEUE_LENGTH
        )
        self.failed: Frames | None = None
        self.decoded = 0
        self._past_latents = past_latents
        self._rewind_to: int | None = None
        self._last: Frames | None = None
        self._stream = acquire_stream(self.device, self) if self.device.type == "cuda" else None
        self._hand_over = acquire_stream(source, self) if self._stream and self.device != source else None
        self._latents = self._place_for_latents(preset) if self._hand_over else None
        self._closed = self._discard = False
        self._closing = threading.Lock()  # a chunk is queued before the end of the queue, or refused
        self._thread = threading.Thread(target=self._work, name="longtake-decode", daemon=True)
        self._thread.start()

    @cached_property
    def _past(self) -> Past:
        """What of the decoder's past is kept, from the first chunk on."""
        return past_of(self.decoder, self._past_latents)

    def submit(self, index: int, latents_BFCHW: Tensor) -> Frames:
        """Queue chunk `index`, fp32 [1, F, C, H, W], in place of what was submitted for it and for later ones before."""
        self.raise_error()
        self.rewind(index)
        ready = None
        if self._stream is not None:
            # The latents are written on the generator's stream: decoding must wait for this point of it.
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.source))
        return self._put(Frames(index), latents_BFCHW, ready)

    def _put(self, frames: Frames, latents: Tensor | None, ready: torch.cuda.Event | None) -> Frames:
        with self._closing:
            if self._closed:
                what, fix = f"chunk {frames.index} cannot be decoded", "load the saved session, or start a new one"
                raise LongtakeError(what, got="a session that was closed meanwhile", expected="an open one", fix=fix)
            before, self._last = self._last, frames  # an interrupt may come once it is queued
            try:
                self._jobs.put((frames, latents, ready))
            except BaseException:
                if not any(job and job[0] is frames for job in list(self._jobs.queue)):
                    self._last = before
                raise
        return frames

    def rewind(self, index: int) -> None:
        """Forget what was submitted from chunk `index` on; what comes next is decoded as if that had never been.

        The error of an earlier chunk stays, also one that shows only now: whoever rewinds to `index` does not know of it.
        """
        if self._last is None or self._last.index < index:
            return
        self._last.wait()
        if self.failed is not None and self.failed.index < index:
            return
        self._rewind_to = index if self._rewind_to is None else min(index, self._rewind_to)
        self.decoded, self.failed, self._last = min(self.decoded, index), None, None

    def raise_error(self) -> None:
        """Raise the error that broke decoding, if one did."""
        if self.failed is not None:
            self.failed.raise_error()

    def state(self) -> list[Tensor]:
        """The decoder's feature caches, copied, after everything submitted; raises a decode error."""
        if self._last is not None:
            self._last.result()
        self._settle()
        copies = [tensor.detach().clone() for tensor in self.decoder.state()]
        self._settle_second_gpu()
        return copies

    @property
    def state_bytes(self) -> int:
        """Bytes of `state`, of a decoder by networks."""
        return self.decoder.kept.bytes if isinstance(self.decoder, NetworkDecoder) else 0

    def load_state(self, tensors: list[Tensor]) -> None:
        """Continue from `tensors` (see Decoder.load_state); forgets an earlier error."""
        if self._last is not None:
            self._last.wait()
        # Copied on the caller's stream, after the decode thread's last use and before the event of the next `submit`.
        self.decoder.load_state(tensors)
        self._past.begin(tensors)
        self._settle_second_gpu()
        self.failed = self._last = self._rewind_to = None
        self.decoded = 0

    def _settle(self) -> None:
        """Go back now to where the next chunk would."""
        if self._rewind_to is None:
            return
        if self._closed:  # its thread has ended
            self._go_back()
            return
        frames = self._put(Frames(self._rewind_to), None, None)
        frames.wait()
        frames.raise_error()
        self._last = None  # it was no chunk

    def _settle_second_gpu(self) -> None:
        """Wait for what the caller enqueued on the decoder's GPU: the event of `submit` is one of the generator's GPU."""
        if self._hand_over is not None:
            torch.cuda.current_stream(self.device).synchronize()

    def close(self, discard: bool = False) -> None:
        """Finish what is queued, or drop it, and end the thread. Calling it twice is harmless.

        What is dropped raises an error for whoever waits for its frames; a chunk that is being decoded is finished.
        """
        self._discard = self._discard or discard
        with self._closing:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _place_for_latents(self, preset: Preset) -> Tensor:
        shape = (1, self._most, preset.vae.z_channels, *preset.latent_hw)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            frames, latents, ready = job
            start = time.perf_counter()
            result: np.ndarray | None = None
            error = self._earlier_error(frames)
            if error is None:
                try:
                    self._go_back()
                    if latents is not None:
                        self._past.before(frames.index)
                        result = self._decode(latents, ready)
                        self._past.after(frames.index, latents)
                        self.decoded = frames.index + 1
                except BaseException as raised:  # noqa: BLE001  (it is raised again in the caller's thread)
                    log.debug("decoding chunk %d failed", frames.index, exc_info=True)
                    error = raised
            if error is not None and self.failed is None:
                self.failed = frames
            frames.settle(result, error, 1e3 * (time.perf_counter() - start))
            del job, latents

    def _earlier_error(self, frames: Frames) -> BaseException | None:
        if self.failed is None and self._discard:
            return LongtakeError(
                f"chunk {frames.index} was not decoded",
                got="a session that was closed",
                fix="load the saved session and generate it again",
            )
        return self.failed.error if self.failed is not None else None

    @torch.no_grad()
    def _go_back(self) -> None:
        """Do what `rewind` has asked for; if it fails, it is still to be done."""
        if self._rewind_to is not None:
            self._past.rewind(self._rewind_to, self._replay)
            self._rewind_to = None

    def _replay(self, latents_BFCHW: Tensor) -> None:
        """Decode for the sake of the state alone."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.source))
        with self._on_own_stream(latents_BFCHW, ready) as latents:
            for latent in latents.unbind(1):
                self.decoder.decode(latent.contiguous())

    @torch.no_grad()
    def _decode(self, latents_BFCHW: Tensor, ready: torch.cuda.Event | None) -> np.ndarray:
        buffer, frames = self._ring.take()
        done = 0
        with self._on_own_stream(latents_BFCHW, ready) as latents:
            for latent in latents.unbind(1):
                done += self._staging.send(self.decoder.decode(latent.contiguous()), buffer[done:])
        self._staging.wait()
        return frames[:done]

    @contextlib.contextmanager
    def _on_own_stream(self, latents: Tensor, ready: torch.cuda.Event | None) -> Iterator[Tensor]:
        """Inside, work is enqueued on the decode stream, after `ready`; yields the latents on the decoder's device."""
        if self._stream is None or ready is None:
            yield latents
            return
        if self._hand_over is None or self._latents is None:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                # Freed by the caller while still being read here: the allocator must not hand the block out before.
                latents.record_stream(self._stream)
                yield latents
            return
        # A copy between GPUs runs on the source's current stream; torch makes it wait for the destination's, and that
        # one wait for it.
        with torch.cuda.stream(self._hand_over), torch.cuda.stream(self._stream):
            self._hand_over.wait_event(ready)
            place = self._latents[:, : latents.shape[1]]
            place.copy_(latents, non_blocking=True)
            latents.record_stream(self._hand_over)
            yield place
