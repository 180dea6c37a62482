"""The decode thread: frames go round in reused buffers, keep what callers hold, and are dropped or drained at the end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.runtime.decode import DecodeQueue
from longtake.runtime.frames import SPARE_BUFFERS, HostRing, Staging, staging_bytes
from longtake.runtime.video_model import VideoModel
from longtake.training.models.presets import TINY

CPU = torch.device("cpu")
SHAPE = (32, 128, 128, 3)


@pytest.fixture
def queue(toy: Any) -> Iterator[DecodeQueue]:
    made = DecodeQueue(VideoModel(toy).decoder(), TINY, CPU)
    yield made
    made.close(discard=True)


def latents(seed: int) -> Tensor:
    return torch.randn(1, 8, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_buffer_comes_back_when_nobody_holds_its_frames() -> None:
    ring = HostRing(SHAPE, pinned=False)
    addresses = set()
    for _ in range(20):
        buffer, frames = ring.take()
        addresses.add(buffer.data_ptr())
        del buffer, frames
    assert ring.made == len(addresses) == 1


def test_views_keep_a_buffer() -> None:
    ring = HostRing(SHAPE, pinned=False)
    held = [ring.take()[1][2:9][1:] for _ in range(SPARE_BUFFERS + 3)]  # views of views
    for i, view in enumerate(held):
        view[...] = i
    assert ring.made == len(held) and [int(view.max()) for view in held] == list(range(len(held)))
    held.clear()
    for _ in range(9):
        ring.take()
    assert ring.made == SPARE_BUFFERS + 3


def test_steady_chunks_need_no_new_buffer(queue: DecodeQueue) -> None:
    for index in range(30):
        assert len(queue.submit(index, latents(index)).result()) == (32 if index else 29)
    assert queue._ring.made <= 3


def test_frames_that_are_kept_are_not_overwritten(queue: DecodeQueue) -> None:
    kept = [queue.submit(index, latents(index)) for index in range(12)]
    copies = [frames.result().copy() for frames in kept]
    for index in range(12, 24):
        queue.submit(index, latents(index)).result()
    gc.collect()
    assert all(np.array_equal(frames.result(), copy) for frames, copy in zip(kept, copies))


def test_bytes_are_rounded_and_clamped() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 1 / 255, 1.0, 3.0])
    frames = values.repeat(3)[:, None, None, None].view(3, 1, 1, 7).contiguous()
    out = torch.zeros(4, 1, 7, 3, dtype=torch.uint8)
    staging = Staging(CPU, (4, 1, 7, 3))
    assert staging.send(frames, out) == 1
    staging.wait()
    assert out[0, 0, :, 0].tolist() == [0, 0, 64, 128, 128, 255, 255] and not out[1:].any()
    assert staging_bytes("cpu", (4, 1, 7, 3)) == staging._scratch.nbytes


def blocked(toy: Any) -> threading.Event:
    """Makes the decoder wait for the event."""
    gate = threading.Event()
    toy.on_decode = lambda: gate.wait(10)
    return gate


def test_discarding_drops_what_waits_and_says_so(toy: Any) -> None:
    queue = DecodeQueue(VideoModel(toy).decoder(), TINY, CPU)
    gate = blocked(toy)
    first, second = queue.submit(0, latents(0)), queue.submit(1, latents(1))
    closing = threading.Thread(target=queue.close, args=(True,))
    closing.start()
    while not queue._discard:
        pass
    gate.set()
    closing.join(10)
    assert not closing.is_alive() and len(first.result()) == 29
    with pytest.raises(LongtakeError, match="chunk 1 was not decoded"):
        second.result()


def test_closing_drains(toy: Any) -> None:
    queue = DecodeQueue(VideoModel(toy).decoder(), TINY, CPU)
    gate = blocked(toy)
    frames = [queue.submit(0, latents(0)), queue.submit(1, latents(1))]
    threading.Timer(0.1, gate.set).start()
    queue.close()
    queue.close()
    assert [len(f.result()) for f in frames] == [29, 32]


def test_leaving_a_session_by_an_error_discards(toy: Any, make_generator: Any) -> None:
    seen: list[bool] = []
    with pytest.raises(KeyboardInterrupt), make_generator(toy).session(["x"] * 3, steps=1, guidance=1.0) as session:
        next(session)
        close = session._decoding.close
        session._decoding.close = lambda discard=False: (seen.append(discard), close(discard))
        raise KeyboardInterrupt
    assert seen == [True]


def test_a_backend_says_where_it_decodes(toy: Any) -> None:
    assert toy.decode_device == CPU
    toy.decode_device = torch.device("cuda", 1)
    assert toy.decode_device == torch.device("cuda", 1)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


class SlowDecoder:
    """Flat frames on a GPU, made by work that takes a while: what is not waited for would come out wrong."""

    def __init__(self, device: torch.device) -> None:
        self.work = torch.randn(2048, 2048, device=device)
        self.frames = torch.empty(3, 4, 128, 128, device=device)
        self.started = False

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        for _ in range(20):
            self.work = torch.nn.functional.normalize(self.work @ self.work)
        frames = self.frames[:, :4] if self.started else self.frames.view(-1)[: 3 * 128 * 128].view(3, 1, 128, 128)
        self.started = True
        return frames.copy_(latent_BCHW.mean().clamp(-1, 1).expand(frames.shape))

    def state(self) -> list[Tensor]:
        return []

    def load_state(self, tensors: list[Tensor]) -> None:
        self.started = bool(tensors)


def check_queue(source: torch.device, device: torch.device) -> None:
    """Chunks generated at once, on the generator's stream, come out right, and the steady loop allocates nothing."""
    queue = DecodeQueue(SlowDecoder(device), TINY, source, device)
    values = [(index % 200) / 100 - 1 for index in range(40)]
    allocated = []
    for index, value in enumerate(values):
        busy = torch.randn(2048, 2048, device=source)
        for _ in range(10):
            busy = torch.nn.functional.normalize(busy @ busy)
        given = torch.full((1, 8, 16, 8, 8), value, device=source) + 0 * busy[0, 0]
        frames = queue.submit(index, given)
        del given, busy
        assert np.all(np.abs(frames.result().astype(float) - (value * 127.5 + 127.5)) <= 1), index
        allocated.append(torch.cuda.memory_stats(device)["segment.all.allocated"])
    queue.close()
    assert len(set(allocated[10:])) == 1 and queue._ring.made <= 3 and queue._ring.pinned


@pytest.mark.gpu
def test_decoding_beside_the_generator_on_one_gpu() -> None:
    check_queue(torch.device("cuda", 0), torch.device("cuda", 0))


@pytest.mark.gpu
def test_decoding_on_another_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, {torch.cuda.device_count()} here")
    check_queue(torch.device("cuda", 0), torch.device("cuda", 1))
