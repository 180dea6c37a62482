"""What building a recipe's plans takes of this machine, and a refusal with figures before a build that would not fit.

TensorRT holds the weights of a plan several times over while it builds: as parsed, as laid out for its kernels, as
the serialized plan. Measured with TensorRT-RTX 1.7 (docs/measurements/build_5b_nvfp4_sm120.json and smaller ones),
peak resident memory was below BASE + FACTOR x the weights' bytes in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from longtake.errors import LongtakeError, UnavailableError
from longtake.files import require_disk
from longtake.formats.onnx_file import data_files, read_onnx, tensor_bytes
from longtake.formats.recipe import Recipe

BASE = 1.5e9  # Python, torch, TensorRT and a plan's graph
FACTOR = {"bf16": 3.3, "fp8": 3.6, "w4a16": 3.6, "nvfp4": 3.6}  # bytes of peak memory a byte of weights
PLAN = 1.1  # bytes of plan a byte of weights
SEGMENT = 50_000_000  # an upper bound of a plan without weights


def require_resources(recipe: Recipe, sources: Sequence[Path | onnx.ModelProto], out: Path) -> None:
    """Check disk and host memory for building a plan from each of `sources`, one after the other.

    Raises:
        LongtakeError: not enough disk space, or a file's weights are not there.
        UnavailableError: not enough memory.
    """
    sizes = [_weight_bytes(source) for source in sources]
    require_disk(out, int(sum(PLAN * size + SEGMENT for size in sizes)))
    needed, free = memory_needed(recipe.precision, max(sizes, default=0)), memory_free()
    if free is not None and free < needed:
        raise UnavailableError(
            f"not enough memory to build {recipe.name}",
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB, for the largest plan's {max(sizes) / 1e9:.2f} GB of weights",
            fix="close other programs, or build a segmented recipe, whose plans hold no weights",
        )


def memory_needed(precision: str, weight_bytes: int) -> int:
    """Peak host memory, in bytes, of building a plan that holds `weight_bytes`."""
    return int(BASE + FACTOR[precision] * weight_bytes)


def memory_free() -> int | None:
    """Bytes of memory that this process may still take: the machine's, or its control group's if that is less."""
    return min((free for free in (_available(), _group_free()) if free is not None), default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _group_free() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return None if limit == "max" else int(limit) - used + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def _weight_bytes(source: Path | onnx.ModelProto) -> int:
    """Bytes of the weights a plan from `source` will hold. A segment's are inputs, so it holds next to none."""
    if not isinstance(source, Path):
        return source.ByteSize()
    model = read_onnx(source, "none")
    outside = any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    if outside and len(data_files(source)) < 2:
        raise LongtakeError(
            f"{source} has no weights",
            got="a skeleton",
            expected=f"{source.name}.data beside it: this plan holds its weights",
            fix="export from checkpoints, longtake export --checkpoints FOLDER, or build a segmented recipe",
        )
    return sum(tensor_bytes(tensor) for tensor in model.graph.initializer)
