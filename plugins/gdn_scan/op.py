"""The scan over frames: three launches. Sums over each frame's tokens, the recurrence, and what tokens read of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longtake.plugins.gdn_scan.reference import EPS, MOST_FRAMES, gdn_scan, gdn_scan_camera
from longtake.plugins.kernels import WARP, Call, Dims, Kernel, Macros, blocks_of
from longtake.plugins.spec import Op, OpSpec, TensorSpec

TILE, ROWS, COLUMNS = 16, 16, 8
HEADS = ("T", "P", "H", "D")
SIZES: tuple[dict[str, int], ...] = (
    {"T": 3, "P": 64, "H": 3, "D": 48},
    {"T": 4, "P": 20, "H": 1, "D": 112},
    {"T": 3, "P": 17, "H": 2, "D": 24},
    {"T": 1, "P": 1, "H": 1, "D": 2},
)


def _spec(camera: bool) -> OpSpec:
    inputs = [TensorSpec(x, "compute", HEADS) for x in "qkv"]
    inputs += [TensorSpec("beta", "fp32", ("T", "P", "H")), TensorSpec("gate", "fp32", ("T", "H"))]
    kept = [TensorSpec("state", "fp32", ("H", "D", "D"))]
    if not camera:
        inputs += [TensorSpec(f"rope_{f}", "fp32", ("T", "P", "D/2")) for f in ("cos", "sin")]
        kept += [TensorSpec("norm", "fp32", ("H", "D"))]
    outputs = [TensorSpec("out", "compute", HEADS), *(TensorSpec(f"{t.name}_out", "fp32", t.shape) for t in kept)]
    name = "gdn_scan_camera" if camera else "gdn_scan"
    return OpSpec(name, (*inputs, *kept), tuple(outputs), multiple=2, most=(("T", MOST_FRAMES),))


def _threads(dims: Dims) -> int:
    return WARP * blocks_of(dims["D"], WARP)


def _parts(camera: bool, dims: Dims) -> dict[str, int]:
    """Floats of each part of the scratch."""
    square, row = dims["T"] * dims["H"] * dims["D"] ** 2, dims["T"] * dims["H"] * dims["D"]
    parts = {"products": square, "added": square, "seen": square}
    return parts if camera else {**parts, "plain_products": square, "weights": row, "sums": row}


def _buffers(camera: bool, dims: Dims, workspace: int) -> Mapping[str, int]:
    places = {}
    for name, floats in _parts(camera, dims).items():
        places[name] = workspace
        workspace += 4 * floats
    return places


def _calls(camera: bool, dims: Dims) -> tuple[Call, ...]:
    frames, heads, size, threads = dims["T"], dims["H"], dims["D"], _threads(dims)
    rope = () if camera else ("rope_cos", "rope_sin")
    plain = () if camera else ("plain_products", "weights")
    norms = () if camera else (*plain, "norm", "sums", "norm_out")
    strips = blocks_of(size, COLUMNS) + (not camera)
    return (
        Call(
            "gdn_sums",
            (frames * heads, blocks_of(size, ROWS)),
            threads,
            ("k", "v", "beta", *rope, *plain, "products", "added"),
        ),
        Call(
            "gdn_frames",
            (heads, strips),
            threads,
            ("products", "added", "gate", "state", *norms, "seen", "state_out", frames),
        ),
        Call(
            "gdn_read",
            (frames * heads, blocks_of(dims["P"], TILE)),
            threads,
            ("q", "seen", *rope, *(() if camera else ("sums",)), "out"),
        ),
    )


def _macros(camera: bool, dims: Dims) -> Macros:
    sizes: Macros = {"HEADS": dims["H"], "HEAD_DIM": dims["D"], "TOKENS": dims["P"], "THREADS": _threads(dims)}
    return {**sizes, "TILE": TILE, "ROWS": ROWS, "COLUMNS": COLUMNS, "CAMERA": int(camera), "EPS": f"{EPS!r}f"}


def _inputs(spec: OpSpec, dims: Dims, compute: torch.dtype, generator: torch.Generator) -> Mapping[str, Tensor]:
    """Features that are not negative, keys that a frame's step does not overshoot with, and gates near one."""

    def draw(*shape: str) -> Tensor:
        return torch.randn([dims[letter] for letter in shape], generator=generator)

    angles = torch.randn(dims["T"], dims["P"], dims["D"] // 2, generator=generator)
    q, k = draw(*HEADS).relu() + 0.1, (draw(*HEADS).relu() + 0.1) * (dims["P"] * dims["D"]) ** -0.5
    camera = "norm" not in {tensor.name for tensor in spec.inputs}
    known = {
        "q": draw(*HEADS) if camera else q,
        "k": k,
        "v": draw(*HEADS),
        "state": 0.3 * draw("H", "D", "D"),
        "norm": draw("H", "D").abs() + 0.1,
    }
    return {
        **{name: x.to(compute) if name in "qkv" else x for name, x in known.items()},
        "beta": draw("T", "P", "H").sigmoid(),
        "gate": torch.exp(-0.05 * draw("T", "H").abs()),
        "rope_cos": angles.cos(),
        "rope_sin": angles.sin(),
    }


def _op(camera: bool) -> Op:
    kernel = Kernel(
        Path(__file__).with_name("kernel.cu"),
        partial(_macros, camera),
        partial(_calls, camera),
        workspace_bytes=lambda dims: 4 * sum(_parts(camera, dims).values()),
        buffers=partial(_buffers, camera),
    )
    reference = gdn_scan_camera if camera else gdn_scan
    return Op(_spec(camera), reference, (kernel,), SIZES, _inputs, tolerance={"bf16": 2e-3, "fp32": 1e-5})


OPS = (_op(camera=False), _op(camera=True))
