"""CUDA streams of one's own, and times of what runs on one. torch.cuda.Stream hands out the same 32 again and again, to whoever asks."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

import torch

_lock = threading.Lock()
_free: dict[int, list[torch.cuda.Stream]] = {}  # by the device's index


def acquire_stream(device: torch.device, owner: object) -> torch.cuda.Stream:
    """A stream that nobody else acquires until `owner` is gone; what is still queued there then runs before the next's work.

    Two users of one stream would wait for each other, and one that captures a graph would capture the other's work, too.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        waiting = _free.setdefault(index, [])
        stream = waiting.pop() if waiting else torch.cuda.Stream(torch.device("cuda", index))
    weakref.finalize(owner, waiting.append, stream).atexit = False
    return stream


@contextlib.contextmanager
def on_own_stream(device: torch.device, owner: object) -> Iterator[None]:
    """Inside, what this thread enqueues and waits for is a stream of its own: `.to("cpu")` does not wait for other threads' work.

    So whatever is read must be whole already. Without a GPU nothing changes.
    """
    with torch.cuda.stream(acquire_stream(device, owner)) if device.type == "cuda" else contextlib.nullcontext():
        yield


def event_times(work: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of `work` on torch's current stream, `repeats` times, each waited for."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times
