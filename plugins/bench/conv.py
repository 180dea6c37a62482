"""Time the convolutions of the Wan2.2-TI2V-5B decoder, 704x1280, one latent a step, through their libraries.

longtake bench kernels conv [--json F]    a row a shape and method, and what a latent takes
    --plans N, --seconds S    how many of cuDNN's plans to try a shape, and for how long
    --scale 8                 frames of an eighth of the size, to see that it runs

Methods: cudnn, our launcher's graph with bias and residual, the best of its plans; cudnn_plain, the product alone; torch,
torch.nn.functional's convolution with cudnn.benchmark, channels last, with bias and without the residual; torch_out, our
second launcher; cublaslt, 1x1x1 only. `error`: relative L2, against fp32 over some rows of one frame. The best plan of
`cudnn` is remembered for later starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.bench.harness import exit_code, milliseconds, no_gpu, print_rows, relative_error
from longtake.plugins.conv.cudnn_conv import CudnnConv, geometry, handle_of
from longtake.plugins.conv.library import TorchConv, conv_launcher, trial_tensors, views
from longtake.plugins.conv.plans import choice_key, remember, timed_plans
from longtake.plugins.ops import REFERENCES

# op, frames in, height, width, channels in, channels out, how often in a step
CASES = (
    ("conv_3x3x3", 3, 44, 80, 48, 1024, 1),
    ("conv_3x3x3", 3, 44, 80, 1024, 1024, 5),
    ("conv_3x3x3_add", 3, 44, 80, 1024, 1024, 5),
    ("conv_3x1x1", 3, 44, 80, 1024, 2048, 1),
    ("conv_1x3x3", 2, 88, 160, 1024, 1024, 1),
    ("conv_3x3x3", 4, 88, 160, 1024, 1024, 3),
    ("conv_3x3x3_add", 4, 88, 160, 1024, 1024, 3),
    ("conv_3x1x1", 4, 88, 160, 1024, 2048, 1),
    ("conv_1x3x3", 4, 176, 320, 1024, 1024, 1),
    ("conv_1x1x1", 4, 176, 320, 1024, 512, 1),
    ("conv_3x3x3", 6, 176, 320, 1024, 512, 1),
    ("conv_3x3x3", 6, 176, 320, 512, 512, 2),
    ("conv_3x3x3_add", 6, 176, 320, 512, 512, 3),
    ("conv_1x3x3", 4, 352, 640, 512, 512, 1),
    ("conv_1x1x1", 4, 352, 640, 512, 256, 1),
    ("conv_3x3x3", 6, 352, 640, 512, 256, 1),
    ("conv_3x3x3", 6, 352, 640, 256, 256, 2),
    ("conv_3x3x3_add", 6, 352, 640, 256, 256, 3),
)
METHODS = ("cudnn", "cudnn_plain", "torch", "torch_out", "cublaslt")
LAUNCHED = ("cudnn", "torch_out", "cublaslt")  # what runs in a network: everything included
COLUMNS = ("op", "shape", "N", "count", "method", "ms", "tflops", "error", "note")
ROWS = 16  # of a frame, that the check compares


def reference_error(op_name: str, tensors: dict[str, Tensor]) -> float:
    """Relative L2 error of `out` in the upper rows of its last frame."""
    time = tensors["x"].shape[0] - tensors["out"].shape[0] + 1
    weight = tensors["weight"].permute(0, 4, 1, 2, 3)
    residual = [tensors["residual"][-1:, : ROWS + 1]] if "residual" in tensors else []
    wanted = REFERENCES[op_name](tensors["x"][-time:, : ROWS + 1], weight, tensors["bias"], *residual)
    height = min(ROWS, tensors["x"].shape[1])  # the row below these is padding to the reference
    return relative_error(tensors["out"][-1:, :height], wanted[:, :height])


def measure(method: str, op_name: str, dims: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """One row's figures. Raises what the library raises."""
    tensors = trial_tensors(op_name, dims)
    tensors["out"].fill_(float("nan"))
    if method in ("cudnn", "cudnn_plain"):
        return _measure_plans(op_name, dims, tensors, method == "cudnn", args)
    if method == "torch":
        sizes = geometry(op_name, dims)
        x, weight, _ = views(sizes, tensors)
        convolution = functional.conv3d if len(sizes.padding) == 3 else functional.conv2d
        torch.backends.cudnn.benchmark = True

        def work() -> None:
            convolution(x, weight, tensors["bias"], padding=sizes.padding)

        return {"ms": milliseconds(work, args.repeats)}
    launcher = TorchConv(op_name, dims).prepare() if method == "torch_out" else conv_launcher(op_name, dims)
    workspace = torch.empty(launcher.workspace_bytes + 1, dtype=torch.uint8, device="cuda")
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    ms = milliseconds(
        lambda: launcher.launch(pointers, torch.cuda.current_stream().cuda_stream, workspace.data_ptr()), args.repeats
    )
    return {"ms": ms, "error": reference_error(op_name, tensors)}


def _measure_plans(
    op_name: str, dims: dict[str, int], tensors: dict[str, Tensor], fused: bool, args: argparse.Namespace
) -> dict[str, Any]:
    conv = CudnnConv(op_name, dims, handle_of(torch.cuda.current_device()), fused)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    tried = list(timed_plans(conv, pointers, args.plans, args.seconds))
    good = sorted((row for row in tried if "ms" in row), key=lambda row: row["ms"])
    if not good:
        raise RuntimeError(f"none of {len(conv.plans)} plans runs: {tried[:2]}")
    best, first = good[0], next(row for row in tried if "ms" in row)
    memory = torch.empty(best["workspace"] + 1, dtype=torch.uint8, device="cuda")

    def work() -> None:
        conv.run(best["plan"], pointers, memory.data_ptr(), torch.cuda.current_stream().cuda_stream)

    row: dict[str, Any] = {"ms": milliseconds(work, args.repeats)}
    if fused:
        row["error"] = reference_error(op_name, tensors)
        remember(choice_key(op_name, dims), best["plan"])
    size = best["workspace"] >> 20
    row["note"] = f"{best['plan']}, {size} MiB; {len(good)} of {len(conv.plans)} ran, first {first['ms']:.3f} ms"
    return row


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every measurement; a method that fails gives a row with the reason."""
    for op_name, frames, height, width, channels, out, count in CASES:
        dims = {"T": frames, "Y": height // args.scale, "X": width // args.scale, "C": channels, "N": out}
        for method in args.methods:
            if method == "cublaslt" and op_name != "conv_1x1x1":
                continue
            shape = "x".join(str(dims[letter]) for letter in "TYXC")
            row: dict[str, Any] = {"op": op_name, "shape": shape, "N": out, "count": count, "method": method}
            try:
                row |= measure(method, op_name, dims, args)
                row["tflops"] = geometry(op_name, dims).flops / row["ms"] / 1e9
            except Exception as error:  # a method that fails must not end the run
                row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            torch.cuda.empty_cache()
            yield row


def sums(found: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a latent: by method, of the shapes that it runs, and with the fastest launcher for each shape."""
    total: dict[str, float] = {}
    best: dict[tuple[Any, ...], float] = {}
    for row in found:
        ms = row["count"] * row.get("ms", float("inf"))
        if "ms" in row:
            total[row["method"]] = total.get(row["method"], 0.0) + ms
        if row["method"] in LAUNCHED:
            key = row["op"], row["shape"], row["N"]
            best[key] = min(best.get(key, float("inf")), ms)
    return {**total, "fastest of " + ", ".join(LAUNCHED): sum(best.values())}


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 without a GPU, 2 if a row could not be timed."""
    parser = argparse.ArgumentParser(prog="longtake bench kernels conv", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--plans", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows there as well, after each one")
    args = parser.parse_args(arguments)
    if no_gpu():
        return 1
    found = print_rows(rows(args), COLUMNS, args.json, cudnn=torch.backends.cudnn.version())
    for name, ms in sums(found).items():
        sys.stdout.write(f"a latent, {name}: {ms:.2f} ms\n")
    return exit_code(found)
