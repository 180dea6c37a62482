"""Run every kernel once at small shapes, against its reference, without a test framework around it.

  compute-sanitizer --tool memcheck --report-api-errors no longtake sanitize
                                    (also: racecheck, initcheck, synccheck)
  longtake sanitize wgmma           only those with this in their name
  longtake sanitize --time          microseconds a launch, tiny preset

Without --report-api-errors no, memcheck also lists the driver entry points that cuda-bindings looks up and an older
driver doesn't have; those are no errors of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longtake.errors import UnavailableError
from longtake.options import Command, option
from longtake.plugins.bench.harness import relative_error
from longtake.plugins.cases import SIZES, op_inputs, sizes_for
from longtake.plugins.kernels import Dims
from longtake.plugins.launch import run_kernel
from longtake.plugins.ops import REFERENCES
from longtake.plugins.sink_attention.hopper import HopperSinkAttention
from longtake.plugins.spec import CACHE_FORMATS, KERNEL_OPS

INDICES = {"kv": ((2,), (-1,)), "sink": ((-1,), (3, 0, 1, -1))}  # the others have none
LIMITS = {"sink": {"bf16": 1e-2, "fp32": 1e-5}} | dict.fromkeys(
    ("qk", "norm", "gated", "residual", "rms"), {"bf16": 1e-3, "fp32": 1e-6}
)  # the others are exact
CODES = 4e-3  # relative error of E4M3 codes where a few roundings go the other way
FP8 = 0.08  # of attention whose queries, keys, values and probabilities are E4M3


def worst_error(op_name: str, dims: Dims, dtype: str, indices: tuple[int, ...]) -> float:
    """Largest relative L2 error over the outputs of one op, on the GPU against the reference on the CPU."""
    inputs = op_inputs(op_name, dims, dtype, indices)
    wanted = REFERENCES[op_name](*inputs)
    got = run_kernel(op_name, *(t.cuda() for t in inputs))
    wanted, got = (x if isinstance(x, tuple) else (x,) for x in (wanted, got))
    errors = [(g.cpu().double() - w.double()).norm() / w.double().norm().clamp(min=1e-30) for g, w in zip(got, wanted)]
    return float(max(errors))


def hopper_error(op_name: str, dims: Dims, indices: tuple[int, ...]) -> float:
    """The same of the FP8 attention that only Hopper has."""
    inputs = op_inputs(op_name, dims, "bf16", indices)
    wanted, on_gpu = REFERENCES[op_name](*inputs), [t.cuda() for t in inputs]
    out, launcher = torch.full_like(on_gpu[0], float("nan")), HopperSinkAttention(op_name, dims)
    memory = torch.empty(launcher.workspace_bytes, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    launcher.launch([t.data_ptr() for t in (*on_gpu, out)], stream, memory.data_ptr(), len(indices))
    return relative_error(out.cpu(), wanted)


def run_hopper() -> bool:
    """FP8 attention at sizes whose tiles are cut. True if it agrees with its reference."""
    good = True
    for op_name in (f"sink_attention_{fmt}" for fmt in CACHE_FORMATS):
        for dims, indices in (
            ({"S": 4, "L": 200, "H": 3, "D": 128}, (2, 0, -1)),
            ({"S": 3, "L": 136, "H": 2, "D": 64}, (1,)),
        ):
            error = hopper_error(op_name, dims, indices)
            good &= error <= FP8
            print(
                f"{'ok ' if error <= FP8 else 'BAD'} {op_name} {HopperSinkAttention.method} {dims} {indices}: {error:.2e}"
            )
    return good


def run_all(wanted: str = "") -> bool:
    """Every op with `wanted` in its name, both dtypes, small sizes. True if all agree with their references."""
    good = torch.cuda.get_device_capability() != (9, 0) or wanted not in HopperSinkAttention.method or run_hopper()
    for op_name in KERNEL_OPS:
        if wanted not in op_name:
            continue
        for dims in (SIZES[1], SIZES[2], SIZES[4]) if sizes_for(op_name) is SIZES else sizes_for(op_name)[1:]:
            for dtype in ("bf16",) if op_name == "nvfp4_dequantize" else ("bf16", "fp32"):
                kind = op_name.split("_")[0]
                for indices in INDICES.get(kind, ((0,),)):
                    error = worst_error(op_name, dims, dtype, indices)
                    codes = any(t.dtype == "fp8" for t in KERNEL_OPS[op_name].outputs)
                    limit = CODES if codes else LIMITS[kind][dtype] if kind in LIMITS else 0.0
                    good &= error <= limit
                    print(f"{'ok ' if error <= limit else 'BAD'} {op_name} {dtype} {dims} {indices}: {error:.2e}")
    return good


def time_all(repeats: int = 200) -> None:
    """Mean time of an op inside a CUDA graph, so that Python's share does not count."""
    for op_name in KERNEL_OPS:
        dims = sizes_for(op_name)[0]
        inputs = [t.cuda() for t in op_inputs(op_name, dims, "bf16", (0, 1, 2, -1) if "sink" in op_name else (1,))]
        run_kernel(op_name, *inputs)
        torch.cuda.synchronize()
        graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                run_kernel(op_name, *inputs)
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        print(f"{op_name} bf16 {dims}: {start.elapsed_time(end) / repeats * 1e3:.1f} us")


@dataclass(frozen=True)
class SanitizeOptions:
    """What"""

    name: str = option("", positional=True, metavar="NAME")
    """only ops with this in their name (default: all)"""
    time: bool = option(False)
    """microseconds a launch, tiny preset"""


def run(options: SanitizeOptions) -> int:
    """Run the kernels; 1 if one disagrees with its reference."""
    if not torch.cuda.is_available():
        raise UnavailableError("this needs an NVIDIA GPU", got="none", fix="run it on a machine with one")
    if options.time:
        time_all()
        return 0
    return 0 if run_all(options.name) else 1


COMMAND = Command(run=run, options=(SanitizeOptions,), description=__doc__ or "")
