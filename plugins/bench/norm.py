"""Time what lies between a block's linears at the sizes of Wan2.2-TI2V-5B, 704x1280, a chunk of 8 latent frames.

longtake bench kernels norm    a table: milliseconds, GB/s of tensors read and written once, share of the
                                         memory's peak, error against the reference; then cross-attention; seconds on an H100
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from longtake.plugins.bench.harness import milliseconds, no_gpu
from longtake.plugins.cross_attention.library import cross_attention_launcher
from longtake.plugins.kernels import shape_of
from longtake.plugins.launch import TORCH_DTYPES, Launcher, OpLauncher
from longtake.plugins.ops import REFERENCES
from longtake.plugins.spec import BLOCK_OPS, OPS

PEAK = 3.35e12  # bytes a second of an H100's memory


def tensors_for(op: str, dims: dict[str, int]) -> list[Tensor]:
    """Inputs as in a network, then empty outputs."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for tensor in OPS[op].inputs:
        values = torch.randn(shape_of(tensor, dims), device="cuda", generator=generator)
        values = values.abs() * 100 if tensor.name == "factor" else values
        made.append(values.to(TORCH_DTYPES["bf16" if tensor.dtype == "compute" else tensor.dtype]))
    for tensor in OPS[op].outputs:
        kind = TORCH_DTYPES["bf16" if tensor.dtype == "compute" else tensor.dtype]
        made.append(torch.empty(shape_of(tensor, dims), dtype=kind, device="cuda"))
    return made


def measure(op: str, dims: dict[str, int], launcher: OpLauncher) -> tuple[float, float, float]:
    """(milliseconds, bytes moved, worst relative L2 error of an output) in bf16."""
    tensors = tensors_for(op, dims)
    given, made = tensors[: len(OPS[op].inputs)], tensors[len(OPS[op].inputs) :]
    wanted = REFERENCES[op](*given)
    workspace = torch.empty(max(launcher.workspace_bytes, 1), dtype=torch.uint8, device="cuda")
    pointers = [t.data_ptr() for t in tensors]

    def work() -> None:
        launcher.launch(pointers, torch.cuda.current_stream().cuda_stream, workspace.data_ptr())

    work()
    wide = [(out.float(), w.float()) for out, w in zip(made, wanted if isinstance(wanted, tuple) else (wanted,))]
    error = max(float((out - w).norm() / w.norm()) for out, w in wide)
    del wanted, wide
    return milliseconds(work, 50), float(sum(t.nbytes for t in tensors)), error


def cases(tokens: int, dim: int, ffn: int, frames: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The ops and their sizes."""
    for op in BLOCK_OPS:
        yield op, {"L": tokens, "C": ffn if op == "gelu_quantize_fp8" else dim, "F": frames}


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="longtake bench kernels norm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--tokens", type=int, default=7040, help="tokens of a chunk")
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--text", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--heads", type=int, default=24)
    args = parser.parse_args(arguments)
    if no_gpu():
        return 1
    sys.stdout.write(f"{torch.cuda.get_device_name()}\n")
    for op, dims in cases(args.tokens, args.dim, args.ffn, args.frames):
        ms, moved, error = measure(op, dims, Launcher(op, dims).prepare())
        speed = moved / ms * 1e3
        sys.stdout.write(f"{op:26} {dims['L']}x{dims['C']:<6} {ms:7.4f} ms {speed / 1e9:6.0f} GB/s {speed / PEAK:5.0%} "
                         f"error {error:.1e}\n")  # fmt: skip
    dims = {"L": args.tokens, "E": args.text, "H": args.heads, "D": args.dim // args.heads}
    launcher = cross_attention_launcher(dims)
    ms, _, error = measure("cross_attention", dims, launcher)
    tflops = 4 * dims["L"] * dims["E"] * args.dim / ms / 1e9
    sys.stdout.write(f"{'cross_attention':26} {dims['L']}x{dims['E']:<6} {ms:7.4f} ms {tflops:6.0f} TFLOP/s "
                     f"({launcher.method}) error {error:.1e}\n")  # fmt: skip
    return 0
