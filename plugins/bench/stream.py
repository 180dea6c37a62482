"""Time the stream extension at the sizes of the Wan2.2-TI2V-5B decoder, 704x1280, one latent a step.

longtake bench kernels stream    a table: milliseconds, GB/s of x, y and cache read and written, error
"""

from __future__ import annotations

import sys

import torch

from longtake.options import Command
from longtake.plugins.bench.harness import milliseconds
from longtake.plugins.launch import TORCH_DTYPES, Launcher
from longtake.plugins.ops import REFERENCES

# op, frames, height, width, channels, how often in a step
CASES = (
    ("stream_extend", 1, 44, 80, 48, 1),
    ("norm_silu_extend", 1, 44, 80, 1024, 10),
    ("stream_extend", 1, 44, 80, 1024, 1),
    ("norm_silu_extend", 2, 88, 160, 1024, 6),
    ("stream_extend", 2, 88, 160, 1024, 1),
    ("norm_silu_extend", 4, 176, 320, 1024, 1),
    ("norm_silu_extend", 4, 176, 320, 512, 5),
    ("norm_silu_extend", 4, 352, 640, 512, 1),
    ("norm_silu_extend", 4, 352, 640, 256, 6),
)
PAST = 2


def measure(op: str, frames: int, height: int, width: int, channels: int) -> tuple[float, float, float]:
    """(milliseconds, GB/s, relative L2 error of y) of one case, in bf16."""
    torch.manual_seed(0)
    sizes = {"T": frames, "Y": height, "X": width, "C": channels, "F": PAST}
    x, cache, y = (
        torch.randn(n, height, width, channels, device="cuda", dtype=TORCH_DTYPES["bf16"])
        for n in (frames, PAST, frames + PAST)
    )
    gamma = [torch.randn(channels, device="cuda", dtype=x.dtype)] if op.startswith("norm") else []
    wanted = REFERENCES[op](x, *gamma, cache)[0].float()
    launcher = Launcher(op, sizes).prepare()
    pointers = [t.data_ptr() for t in (x, *gamma, cache, y, cache)]
    launcher.launch(pointers, torch.cuda.current_stream().cuda_stream)
    error = float((y.float() - wanted).norm() / wanted.norm())
    del wanted
    ms = milliseconds(lambda: launcher.launch(pointers, torch.cuda.current_stream().cuda_stream), 50)
    moved = 2 * sum(t.nbytes for t in (x, cache)) + min(frames, PAST) * cache[0].nbytes
    return ms, moved / ms / 1e6, error


def main() -> int:
    """Print the table and the sum over a step."""
    if not torch.cuda.is_available():
        sys.stderr.write("this needs an NVIDIA GPU\n")
        return 3
    total = 0.0
    sys.stdout.write(f"{torch.cuda.get_device_name()}\n")
    for op, frames, height, width, channels, count in CASES:
        ms, speed, error = measure(op, frames, height, width, channels)
        total += count * ms
        shape = f"{frames}x{height}x{width}x{channels}"
        sys.stdout.write(f"{op:17} {shape:18} {ms:7.3f} ms {speed:6.0f} GB/s  error {error:.1e}  x{count}\n")
    sys.stdout.write(f"a step: {total:.2f} ms\n")
    return 0


COMMAND = Command(run=main, options=(), description=__doc__ or "")
