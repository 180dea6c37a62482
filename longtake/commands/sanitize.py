"""Run every kernel once at small shapes, against its reference, without a test framework around it.

  compute-sanitizer --tool memcheck --report-api-errors no longtake sanitize
                                    (also: racecheck, initcheck, synccheck)
  longtake sanitize wgmma           only those with this in their name
  longtake sanitize conv8           only the convolutions of 8-bit codes
  longtake sanitize --time          microseconds a launch, tiny preset

Without --report-api-errors no, memcheck also lists the driver entry points that cuda-bindings looks up and an older
driver doesn't have; those are no errors of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from longtake.options import Command, option
from longtake.plugins.bench.harness import milliseconds, relative_error, require_gpu
from longtake.plugins.cases import op_inputs
from longtake.plugins.conv.reference import library_weight
from longtake.plugins.conv8.hopper import LARGE, SMALL, TRIAL_ERROR, WIDE, HopperConv, HopperRowsConv
from longtake.plugins.conv8.op import OPS as CONVS
from longtake.plugins.kernels import Dims
from longtake.plugins.registry import kernel_ops
from longtake.plugins.run import run_kernel
from longtake.plugins.sink_attention.hopper import HopperSinkAttention
from longtake.plugins.sink_attention.op import OPS as ATTENTIONS
from longtake.plugins.spec import Op

FP8 = 0.08  # of attention whose queries, keys, values and probabilities are E4M3


def worst_error(op: Op, dims: Dims, dtype: str, indices: tuple[int, ...]) -> float:
    """Largest relative L2 error over the outputs of one op, on the GPU against the reference on the CPU."""
    inputs = op_inputs(op.name, dims, dtype, indices)
    wanted = op.reference(*inputs)
    got = run_kernel(op.name, *(t.cuda() for t in inputs))
    wanted, got = (x if isinstance(x, tuple) else (x,) for x in (wanted, got))
    errors = [(g.cpu().double() - w.double()).norm() / w.double().norm().clamp(min=1e-30) for g, w in zip(got, wanted)]
    return float(max(errors))


def hopper_error(op: Op, dims: Dims, indices: tuple[int, ...]) -> float:
    """The same of the FP8 attention that only Hopper has."""
    inputs = op_inputs(op.name, dims, "bf16", indices)
    wanted, on_gpu = op.reference(*inputs), [t.cuda() for t in inputs]
    out, launcher = torch.full_like(on_gpu[0], float("nan")), HopperSinkAttention(op, dims)
    memory = torch.empty(launcher.workspace_bytes, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    launcher.launch([t.data_ptr() for t in (*on_gpu, out)], stream, memory.data_ptr(), len(indices))
    return relative_error(out.cpu(), wanted)


CUT_TILES: tuple[tuple[Dims, tuple[int, ...]], ...] = (
    ({"S": 4, "L": 200, "H": 3, "D": 128}, (2, 0, -1)),
    ({"S": 3, "L": 136, "H": 2, "D": 64}, (1,)),
)


def run_hopper() -> bool:
    """FP8 attention at sizes whose tiles are cut. True if it agrees with its reference."""
    good = True
    for op, (dims, indices) in product(ATTENTIONS, CUT_TILES):
        error = hopper_error(op, dims, indices)
        good &= _told(f"{op.name} {HopperSinkAttention.method} {dims} {indices}", error, FP8)
    return good


def conv_error(launcher: HopperConv) -> float:
    """The same of a convolution of codes by our kernel for Hopper."""
    op, dims = launcher.op, launcher.dims
    inputs = op_inputs(op.name, dims, "bf16")
    wanted = op.reference(*inputs)
    on_gpu = [(library_weight(t) if t.dim() == 5 else t).cuda() for t in inputs]
    out = torch.full(tuple(wanted.shape), float("nan"), dtype=torch.bfloat16, device="cuda")
    launcher.launch([t.data_ptr() for t in (*on_gpu, out)], torch.cuda.current_stream().cuda_stream)
    return relative_error(out.cpu(), wanted)


def run_convs() -> bool:
    """Convolutions of codes at sizes that no tile divides, in every form. True if they agree with their references."""
    good = True
    for op, kind, tile in product(CONVS, (HopperConv, HopperRowsConv), (LARGE, SMALL, WIDE)):
        if tile != WIDE or op.codes == "int8":
            launcher = kind(op, {"T": 4, "Y": 11, "X": 35, "C": 144, "N": 136}, tile=tile)
            error = conv_error(launcher)
            good &= _told(f"{op.name} {kind.method} {tile} {launcher.dims}", error, TRIAL_ERROR)
    return good


def _told(what: str, error: float, limit: float) -> bool:
    print(f"{'ok ' if error <= limit else 'BAD'} {what}: {error:.2e}")
    return error <= limit


def run_all(wanted: str = "") -> bool:
    """Every op with `wanted` in its name, both dtypes, small sizes. True if all agree with their references."""
    good = torch.cuda.get_device_capability() != (9, 0) or wanted not in HopperSinkAttention.method or run_hopper()
    if torch.cuda.get_device_capability() == (9, 0) and (wanted in HopperConv.method or wanted in "conv8"):
        good &= run_convs()
    for op in (op for name, op in kernel_ops().items() if wanted in name):
        for dims, dtype, indices in product(op.sizes[1:], op.compute_dtypes, op.indices):
            error = worst_error(op, dims, dtype, indices)
            good &= _told(f"{op.name} {dtype} {dims} {indices}", error, op.tolerance.get(dtype, 0.0))
    return good


def time_all(repeats: int = 200) -> None:
    """Mean time of an op inside a CUDA graph, so that Python's share does not count."""
    for name, op in kernel_ops().items():
        dims = op.sizes[0]
        inputs = [t.cuda() for t in op_inputs(name, dims, "bf16", op.indices[0])]

        def work(name: str = name, inputs: list[torch.Tensor] = inputs) -> None:
            for _ in range(repeats):
                run_kernel(name, *inputs)

        print(f"{name} bf16 {dims}: {milliseconds(work, 3) / repeats * 1e3:.1f} us")


@dataclass(frozen=True)
class SanitizeOptions:
    """What"""

    name: str = option("", positional=True, metavar="NAME")
    """only ops with this in their name (default: all)"""
    time: bool = option(False)
    """microseconds a launch, tiny preset"""


def run(options: SanitizeOptions) -> int:
    """Run the kernels; 1 if one disagrees with its reference."""
    require_gpu()
    if options.time:
        time_all()
        return 0
    return 0 if run_all(options.name) else 1


COMMAND = Command(run=run, options=(SanitizeOptions,), description=__doc__ or "")
