"""Time the convolutions of the Wan2.2-TI2V-5B decoder, 704x1280, one latent a step, through their libraries.

A row a shape and method, and what a latent takes. Methods: cudnn, our launcher's graph with bias and residual, the best of
its plans; cudnn_plain, the product alone; torch, torch.nn.functional's convolution with cudnn.benchmark, channels last, with
bias and without the residual; torch_out, our second launcher; cublaslt, 1x1x1 only; fp8 and int8, our kernel on 8-bit codes
(all but the first shape and 1x1x1; 1x3x3 folded with the upsampling before it), fp8_fast without promoting sums, fp8_rows and
int8_rows its fallback, fp8_late and int8_late without fetching the residual ahead. `error`: relative L2, against fp32 over some
rows of one frame, of the same codes where codes are read. The best plan of `cudnn` is remembered for later starts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional

from longtake.options import Command, OneOf, check, option
from longtake.plugins.bench.harness import Row, TableOptions, exit_code, milliseconds, note_of, relative_error
from longtake.plugins.codes import encode, factor_of
from longtake.plugins.conv.cudnn_conv import CudnnConv, geometry, handle_of
from longtake.plugins.conv.library import trial_tensors, views
from longtake.plugins.conv.plans import choice_key, remember, timed_plans
from longtake.plugins.conv.reference import library_weight
from longtake.plugins.conv8.hopper import HopperConv, HopperRowsConv
from longtake.plugins.conv8.reference import FOLDED, stored_weight
from longtake.plugins.registry import coded_op, op_named
from longtake.plugins.run import launcher_by
from longtake.plugins.shapes import shape_of
from longtake.plugins.spec import Op

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
CODED: dict[str, tuple[type[HopperConv], dict[str, Any]]] = {  # of codes: the launcher, and how it differs from what runs in a network
    "fp8": (HopperConv, {}), "int8": (HopperConv, {}), "fp8_fast": (HopperConv, {"promote": 0}),
    "fp8_rows": (HopperRowsConv, {}), "int8_rows": (HopperRowsConv, {}), "fp8_late": (HopperConv, {"ahead": False}),
    "int8_late": (HopperConv, {"ahead": False}),
}  # fmt: skip
METHODS = ("cudnn", "cudnn_plain", "torch", "torch_out", "cublaslt", *CODED)
LAUNCHED = {"cudnn": "cudnn", "torch_out": "torch", "cublaslt": "cublaslt"}  # in a network: everything included
COLUMNS = ("op", "shape", "N", "count", "method", "ms", "tflops", "error", "note")
ROWS = 16  # of a frame, that the check compares


@dataclass(frozen=True)
class ConvOptions:
    """What"""

    methods: Annotated[tuple[str, ...], OneOf(METHODS)] = option(METHODS)
    """which to time"""
    plans: int = option(16, metavar="N")
    """cuDNN's plans to try for a shape"""
    seconds: float = option(4.0, metavar="S")
    """time to try them for"""
    repeats: int = option(5, metavar="N")
    """runs that the median is of"""
    scale: int = option(1, metavar="N")
    """divisor of a frame's sides: 8 is to see that it runs"""

    def __post_init__(self) -> None:
        check(self)


def reference_error(op: Op, tensors: dict[str, Tensor]) -> float:
    """Relative L2 error of `out` in the upper rows of its last frame."""
    time = tensors["x"].shape[0] - tensors["out"].shape[0] + 1
    weight = tensors["weight"].permute(0, 4, 1, 2, 3)
    residual = [tensors["residual"][-1:, : ROWS + 1]] if "residual" in tensors else []
    scale = [tensors["scale"]] if "scale" in tensors else []
    wanted = op.reference(tensors["x"][-time:, : ROWS + 1], weight, *scale, tensors["bias"], *residual)
    height = min(ROWS, tensors["x"].shape[1])  # the row below these is padding to the reference
    return relative_error(tensors["out"][-1:, :height], wanted[:, :height])


def measure(method: str, op: Op, dims: dict[str, int], options: ConvOptions) -> Row:
    """One row's figures. Raises what the library raises."""
    tensors = trial_tensors(op, dims)
    tensors["out"].fill_(float("nan"))
    if method in ("cudnn", "cudnn_plain"):
        return _measure_plans(op, dims, tensors, method == "cudnn", options)
    if method == "torch":
        sizes = geometry(op, dims)
        x, weight, _ = views(sizes, tensors)
        convolution = functional.conv3d if len(sizes.padding) == 3 else functional.conv2d
        torch.backends.cudnn.benchmark = True

        def work() -> None:
            convolution(x, weight, tensors["bias"], padding=sizes.padding)

        return {"ms": milliseconds(work, options.repeats)}
    launcher = launcher_by(op, LAUNCHED[method], dims)
    workspace = torch.empty(launcher.workspace_bytes + 1, dtype=torch.uint8, device="cuda")
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    ms = milliseconds(
        lambda: launcher.launch(pointers, torch.cuda.current_stream().cuda_stream, workspace.data_ptr()),
        options.repeats,
    )
    return {"ms": ms, "error": reference_error(op, tensors)}


def measure_codes(method: str, name: str, dims: dict[str, int], options: ConvOptions) -> Row:
    """The same of a convolution of codes: of SiLU of normal numbers, and of normal weights."""
    codes, (kind, changed) = method.split("_")[0], CODED[method]
    op = op_named(coded_op(name, codes))
    up = op.kernel_size == FOLDED
    dims = {**dims, "Y": dims["Y"] // 2, "X": dims["X"] // 2} if up else dims
    plain = trial_tensors(op_named(name), dims)
    x, weight = functional.silu(plain["x"].float()), plain["weight"].permute(0, 4, 1, 2, 3)
    factor = factor_of(float(x.abs().max()), codes)
    stored, worth = stored_weight(weight, codes)
    if up:
        plain["out"] = plain["out"].new_empty(shape_of(op.spec.outputs[0], dims))
    tensors = {**plain, "x": encode(x * factor, codes), "weight": library_weight(stored), "scale": worth / factor}
    tensors = {tensor.name: tensors[tensor.name] for tensor in op.spec.tensors}
    del plain, x, weight, stored
    tensors["out"].fill_(float("nan"))
    launcher = kind(op, dims, **changed)
    launcher.prepare()
    launcher.try_out()
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    ms = milliseconds(lambda: launcher.launch(pointers, torch.cuda.current_stream().cuda_stream), options.repeats)
    tile = launcher.tile
    flops, note = geometry(op, dims).flops, f"tile {tile.x}x{tile.y}x{tile.n}"
    return {"ms": ms, "error": reference_error(op, tensors), "tflops": flops / ms / 1e9, "note": note}


def _measure_plans(op: Op, dims: dict[str, int], tensors: dict[str, Tensor], fused: bool, options: ConvOptions) -> Row:
    conv = CudnnConv(op, dims, handle_of(torch.cuda.current_device()), fused)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    tried = list(timed_plans(conv, pointers, options.plans, options.seconds))
    good = sorted((row for row in tried if "ms" in row), key=lambda row: row["ms"])
    if not good:
        raise RuntimeError(f"none of {len(conv.plans)} plans runs: {tried[:2]}")
    best, first = good[0], next(row for row in tried if "ms" in row)
    memory = torch.empty(best["workspace"] + 1, dtype=torch.uint8, device="cuda")

    def work() -> None:
        conv.run(best["plan"], pointers, memory.data_ptr(), torch.cuda.current_stream().cuda_stream)

    row: Row = {"ms": milliseconds(work, options.repeats)}
    if fused:
        row["error"] = reference_error(op, tensors)
        remember(choice_key(op.name, dims), best["plan"])
    size = best["workspace"] >> 20
    row["note"] = f"{best['plan']}, {size} MiB; {len(good)} of {len(conv.plans)} ran, first {first['ms']:.3f} ms"
    return row


def rows(options: ConvOptions) -> Iterator[Row]:
    """Every measurement; a method that fails gives a row with the reason."""
    for name, frames, height, width, channels, out, count in CASES:
        op = op_named(name)
        dims = {"T": frames, "Y": height // options.scale, "X": width // options.scale, "C": channels, "N": out}
        for method in options.methods:
            if method == "cublaslt" and method not in {way.method for way in op.ways}:
                continue
            if method in CODED and (channels < 128 or op.kernel_size == (1, 1, 1)):
                continue
            shape = "x".join(str(dims[letter]) for letter in "TYXC")
            row: Row = {"op": name, "shape": shape, "N": out, "count": count, "method": method}
            try:
                row |= (
                    measure_codes(method, name, dims, options)
                    if method in CODED
                    else measure(method, op, dims, options)
                )
                row.setdefault("tflops", geometry(op, dims).flops / row["ms"] / 1e9)
            except Exception as error:  # a method that fails must not end the run
                row["note"] = note_of(error)
            torch.cuda.empty_cache()
            yield row


def summary(rows: list[Row]) -> list[str]:
    """Milliseconds a latent: by method, of the shapes that it runs; with the fastest launcher in 16 bits for each shape; and
    with codes wherever they run, the others in 16 bits."""
    total: dict[str, float] = {}
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        ms = row["count"] * row.get("ms", float("inf"))
        if "ms" in row:
            total[row["method"]] = total.get(row["method"], 0.0) + ms
        if row["method"] in LAUNCHED:
            key = row["op"], row["shape"], row["N"]
            best[key] = min(best.get(key, float("inf")), ms)
    total["fastest of " + ", ".join(LAUNCHED)] = sum(best.values())
    for method in {row["method"] for row in rows if row["method"] in CODED}:
        own = {(r["op"], r["shape"], r["N"]): r["count"] * r["ms"] for r in rows if r["method"] == method and "ms" in r}
        total[f"{method}, the rest in 16 bits"] = sum({**best, **own}.values())
    return [f"a latent, {name}: {ms:.2f} ms" for name, ms in total.items()]


def run(options: ConvOptions, table: TableOptions) -> int:
    """Print the table, and the sums."""
    measured = table.show(COLUMNS, rows(options), cudnn=torch.backends.cudnn.version())
    sys.stdout.write("\n".join(summary(measured)) + "\n")
    return exit_code(measured)


COMMAND = Command(run, (ConvOptions, TableOptions), __doc__)
