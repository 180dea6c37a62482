"""The decoder on another GPU than the generator: hand-overs that single-GPU events don't order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.plugins.run import run_kernel
from longtake.runtime.decode import DecodeQueue
from longtake.training.models.presets import TINY

ONE, TWO = torch.device("cuda", 0), torch.device("cuda", 1)


def need_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, {torch.cuda.device_count()} here")


def busy(device: torch.device) -> Tensor:
    """Something that a device works on for a while."""
    x = torch.randn(4096, 4096, device=device)
    for _ in range(10):
        x = torch.nn.functional.normalize(x @ x)
    return x


class CountingDecoder:
    """A state of one number, which every latent adds one to and which is the frames' brightness, in steps of 1/100."""

    def __init__(self, device: torch.device) -> None:
        self.number = torch.zeros(1, device=device)
        torch.cuda.synchronize(device)

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        self.number += 1 + 0 * busy(self.number.device)[0, 0] + 0 * latent_BCHW.mean()
        return (self.number / 100).expand(3, 4 * 128 * 128).reshape(3, 4, 128, 128)

    def state(self) -> list[Tensor]:
        return [self.number]

    def load_state(self, tensors: list[Tensor]) -> None:
        self.number.copy_(tensors[0] + 0 * busy(self.number.device)[0, 0])


@pytest.mark.gpu
def test_state_saved_and_loaded_is_ordered_with_the_decoding() -> None:
    need_two_gpus()
    queue = DecodeQueue(CountingDecoder(TWO), TINY, ONE, TWO)
    latents = torch.zeros(1, TINY.chunk_latents, TINY.vae.z_channels, *TINY.latent_hw, device=ONE)
    queue.submit(0, latents)
    (saved,) = queue.state()
    queue.submit(1, latents).result()
    assert float(saved) == TINY.chunk_latents
    for index in range(2, 5):
        queue.load_state([saved])
        frames = queue.submit(index, latents).result()
        expected = round(127.5 + 127.5 * 2 * TINY.chunk_latents / 100)
        assert abs(int(frames[-1, 0, 0, 0]) - expected) <= 1, index
    queue.close()


@pytest.mark.gpu
@pytest.mark.parametrize("device", [0, 1])
def test_a_plugin_s_kernels_run_on_each_gpu(device: int) -> None:
    """Loaded once a context: a kernel of the first GPU's would not run on the second."""
    need_two_gpus()

    x = torch.randn(2, 8, 8, 32, device=torch.device("cuda", device)).bfloat16()
    past = torch.zeros_like(x)
    extended, history = run_kernel("stream_extend", x, past)
    torch.cuda.synchronize(device)
    assert extended.device.index == device and torch.equal(extended[-2:], x)
    assert torch.equal(history, x)


@pytest.mark.gpu
def test_a_graph_is_captured_on_the_second_gpu_after_one_on_the_first() -> None:
    """torch keeps one capture stream a process, on the GPU that was current first: ours are the backend's."""
    need_two_gpus()
    for device in (ONE, TWO):
        with torch.cuda.device(device):
            x, graph = torch.ones(4, device=device), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                x += 1
            graph.replay()
            torch.cuda.synchronize(device)
            assert float(x[0]) == 2
