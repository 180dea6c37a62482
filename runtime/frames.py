"""The way of decoded frames to the host: device buffers and pinned host buffers, all reused.

Legend: T video frames, H, W sizes.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from longtake.cuda_streams import acquire_stream

SPARE_BUFFERS = 4  # host buffers kept for reuse: one being filled, one waiting, one being written to disk, one to spare


class HostRing:
    """Host buffers for a chunk's frames. A buffer comes back when nobody holds its array any more, views included.

    So a caller may keep frames for as long as it likes, and one that does not makes the same few buffers go round.
    """

    def __init__(self, shape_THWC: tuple[int, int, int, int], pinned: bool) -> None:
        self.shape, self.pinned = shape_THWC, pinned
        self.made = 0
        # A deque, because buffers come back from finalizers, in any thread and in the middle of anything.
        self._free: deque[Tensor] = deque(maxlen=SPARE_BUFFERS)

    def take(self) -> tuple[Tensor, np.ndarray]:
        """A buffer uint8 [T, H, W, 3] as a tensor to fill, and as the array to hand out."""
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = torch.empty(self.shape, dtype=torch.uint8, pin_memory=self.pinned)
            self.made += 1
        array = buffer.numpy()
        weakref.finalize(array, self._free.append, buffer).atexit = False
        return buffer, array


class Staging:
    """Turns decoded frames into bytes and sends them to the host on a stream of its own, beside the next decode."""

    def __init__(self, device: torch.device, shape_THWC: tuple[int, int, int, int]) -> None:
        self._cuda = device.type == "cuda"
        self._scratch = torch.empty(shape_THWC, dtype=torch.float32, device=device).view(-1)
        if self._cuda:
            self._bytes = [torch.empty(shape_THWC, dtype=torch.uint8, device=device) for _ in range(2)]
            self._sent = [torch.cuda.Event() for _ in self._bytes]
            self._stream = acquire_stream(device, self)
            self._turn = 0

    def send(self, frames_CTHW: Tensor, to_THWC: Tensor) -> int:
        """Enqueue: [-1, 1] fp32 [3, T, H, W], on the current stream, to the first T of a host buffer. Returns T."""
        count = frames_CTHW.shape[1]
        scratch = self._scratch[: frames_CTHW.numel()].view(frames_CTHW.shape)
        torch.mul(frames_CTHW, 127.5, out=scratch).add_(127.5).round_().clamp_(0, 255)
        pixels_THWC = scratch.permute(1, 2, 3, 0)
        if not self._cuda:
            to_THWC[:count].copy_(pixels_THWC)
            return count
        self._turn = 1 - self._turn
        staged, sent = self._bytes[self._turn][:count], self._sent[self._turn]
        current = torch.cuda.current_stream(staged.device)
        current.wait_event(sent)  # the copy of two groups ago may still read these bytes
        staged.copy_(pixels_THWC)
        self._stream.wait_stream(current)  # the bytes are written there
        with torch.cuda.stream(self._stream):
            to_THWC[:count].copy_(staged, non_blocking=True)
            sent.record(self._stream)
        return count

    def wait(self) -> None:
        """Block until everything sent is on the host."""
        if self._cuda:
            self._stream.synchronize()


def staging_bytes(device_type: str, shape_THWC: tuple[int, int, int, int]) -> int:
    """Device memory of a Staging."""
    pixels = int(np.prod(shape_THWC))
    return 4 * pixels + (2 * pixels if device_type == "cuda" else 0)
