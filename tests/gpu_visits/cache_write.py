"""Times the cache write of the tree whose `longtake` is imported, at the 5B model's sizes; prints JSON. Called by realtime.py.

A call gets K and V of another layer than the one before, so that none finds them in the L2 cache; what it writes is compared with
the reference, bit for bit.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import longtake
from longtake.plugins.launch import Launcher
from longtake.plugins.registry import op_named

DIMS = {"S": 4, "L": 7040, "H": 24, "D": 128}
LAYERS, REPEATS, SLOT = 6, 50, 2


def milliseconds(calls: list[Any]) -> float:
    """Median over REPEATS of one call, in turns over the layers, as a CUDA graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    spent = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end) / len(calls))
    return statistics.median(spent)


def main() -> int:
    op, generator = op_named("kv_cache_write_nvfp4"), torch.Generator("cuda").manual_seed(0)
    launcher = Launcher(op, DIMS)
    launcher.prepare()
    shape = (DIMS["L"], DIMS["H"], DIMS["D"])
    slots = (DIMS["S"], 2, *shape)
    space = torch.empty(launcher.workspace_bytes, dtype=torch.uint8, device="cuda")
    slot = torch.tensor([SLOT], dtype=torch.int32, device="cuda")
    layers = []
    for _ in range(LAYERS):
        k, v = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in "kv")
        values = torch.zeros((*slots[:-1], DIMS["D"] // 2), dtype=torch.int8, device="cuda")
        scales = torch.zeros((*slots[:-1], DIMS["D"] // 16), dtype=torch.int8, device="cuda")
        amax = torch.zeros((DIMS["S"], 2), device="cuda")
        layers.append((k, v, values, scales, amax))

    def launches(first: int, last: int) -> list[Any]:
        def of(tensors: tuple[torch.Tensor, ...]) -> Any:
            pointers = [t.data_ptr() for t in (*tensors, slot, *tensors[2:])]

            def call() -> None:
                stream = torch.cuda.current_stream().cuda_stream
                launcher.enqueue(launcher._calls[first:last], pointers, stream, space.data_ptr(), 0, first)

            return call

        return [of(tensors) for tensors in layers]

    row: dict[str, Any] = {
        "longtake": str(Path(longtake.__file__).resolve().parent),
        "gpu": torch.cuda.get_device_name(),
    }
    row |= {"dims": DIMS, "ms": milliseconds(launches(0, 2)), "amax_ms": milliseconds(launches(0, 1))}
    row["pack_ms"] = milliseconds(launches(1, 2))  # alone: with nothing that it may find in the L2 cache
    once = sum(t.nbytes for t in layers[0][:2]) + sum(t[SLOT].nbytes for t in layers[0][2:])
    row |= {"gb_s": once / row["ms"] / 1e6}
    launches(0, 2)[0]()
    wanted = op.reference(*(t.cpu() for t in layers[0]), slot.cpu())
    row["equal"] = all(torch.equal(t.cpu(), w) for t, w in zip(layers[0][2:], wanted, strict=True))
    print(json.dumps(row))
    return 0 if row["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
