"""The write into a slot: one launch, a thread an element."""

from __future__ import annotations

from pathlib import Path

from longtake.errors import LongtakeError
from longtake.plugins.kernels import Call, Dims, Kernel, blocks_of
from longtake.plugins.slot_write.reference import slot_write
from longtake.plugins.spec import Op, OpSpec, TensorSpec

THREADS = 256


def _check(dims: Dims) -> None:
    if dims["N"] > dims["K"]:
        raise LongtakeError(
            "slot_write: a slot is too small", got=f"{dims['N']} elements", expected=f"at most {dims['K']}"
        )


SPEC = OpSpec(
    "slot_write",
    inputs=(
        TensorSpec("value", "compute", ("N",)),
        TensorSpec("state", "compute", ("S", "K")),
        TensorSpec("write_slot", "int32", ("1",)),
    ),
    outputs=(TensorSpec("state", "compute", ("S", "K")),),
    aliases=((0, 1),),
    check=_check,
    multiple=1,
    free=("S",),
)


def _calls(dims: Dims) -> tuple[Call, ...]:
    arguments = ("value", "write_slot", "state", dims["S"], dims["N"], dims["K"])
    return (Call("slot_write", (blocks_of(dims["N"], THREADS), 1), THREADS, arguments),)


OPS = (
    Op(
        SPEC,
        slot_write,
        ways=(Kernel(Path(__file__).with_name("kernel.cu"), lambda dims: {"THREADS": THREADS}, _calls),),
        sizes=({"N": 640, "S": 2, "K": 640}, {"N": 300, "S": 3, "K": 400}, {"N": 5, "S": 2, "K": 7}),
        indices=((2,), (1,), (0,), (-1,)),
    ),
)
