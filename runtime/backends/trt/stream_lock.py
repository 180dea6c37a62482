"""The lock of engines that share scratch memory: they run one after another, whatever stream their callers work on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longtake.cuda_streams import acquire_stream


class StreamLock:
    """Held by one caller at a time, on whatever stream it works.

    Work stays on the caller's stream, except that the default stream is left for one of our own: TensorRT synchronizes
    the device there. Ours waits for what the caller has enqueued and the caller's then waits for ours, so to the
    caller it looks like one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._own = acquire_stream(device, self)
        self._done = torch.cuda.Event()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, torch's current stream is the one to enqueue on, and nobody else uses these engines."""
        caller = torch.cuda.current_stream(self.device)
        stream = caller if caller.cuda_stream else self._own
        with self._lock:
            if stream is self._own:
                stream.wait_stream(caller)
            stream.wait_event(self._done)  # the last holder may have been on another stream, with the same buffers
            try:
                with torch.cuda.stream(stream):
                    yield
            finally:  # also after a failure: what was enqueued before it still uses the buffers
                self._done.record(stream)
                if stream is self._own:
                    caller.wait_stream(stream)
