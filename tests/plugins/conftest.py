"""Run the CUDA kernels on the CPU: the same .cu text as host C++, through the launcher's own argument lists."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.plugins.kernels import COMPUTE_DTYPES, dims_from_shapes, kernels_of, shape_of
from longtake.plugins.launch import TORCH_DTYPES, Launcher
from longtake.plugins.nvrtc import INCLUDE

HERE = Path(__file__).resolve().parent


@cache
def _library(source: Path, macros: tuple[str, ...], functions: tuple[str, ...], folder: Path, reverse: bool) -> Any:
    name = f"{source.parent.name}_{abs(hash((macros, reverse))):x}"
    exports = "\n".join(f"EXPORT({function})" for function in functions)
    text = folder / f"{name}.cpp"
    text.write_text(f'#include "host_cuda.h"\n#include "{source}"\n{exports}\n')
    flags = [
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        f"-I{HERE}",
        f"-I{INCLUDE}",
    ]
    order = ["-DHOST_REVERSED"] if reverse else []
    subprocess.run(
        ["g++", *flags, *order, *macros, str(text), "-o", str(folder / f"{name}.so")], check=True, capture_output=True
    )
    return ctypes.CDLL(str(folder / f"{name}.so"))


def run_on_host(op_name: str, *tensors: Tensor, folder: Path, reverse: bool = False) -> tuple[Tensor, ...]:
    """Like launch.run_kernel, on CPU tensors. Outputs that alias nothing start poisoned."""
    kernels = kernels_of(op_name)
    spec = kernels.spec
    dims = dims_from_shapes(spec, [t.shape for t in tensors])
    dtype = "fp32" if spec.inputs[0].dtype == "compute" and tensors[0].dtype == torch.float32 else "bf16"
    launcher = Launcher(op_name, dims, dtype)
    aliases = dict(spec.aliases)
    outputs = tuple(
        tensors[aliases[i]] if i in aliases else torch.full(shape_of(t, dims), float("nan"), dtype=TORCH_DTYPES[dtype])
        for i, t in enumerate(spec.outputs)
    )
    workspace = torch.full((max(launcher.workspace_bytes, 1),), 0x7F, dtype=torch.uint8)
    calls = kernels.calls(dims)
    macros = {**kernels.macros(dims), "COMPUTE_BF16": int(dtype == COMPUTE_DTYPES[0])}
    defines = tuple(f"-D{name}={value}" for name, value in macros.items())
    library = _library(kernels.source, defines, tuple(c.function for c in calls), folder, reverse)
    pointers = [t.data_ptr() for t in (*tensors, *outputs)]
    for call in calls:
        values = launcher.arguments(call, pointers, workspace.data_ptr(), dims.get("W", 0))
        boxes = [ctypes.c_int64(value) for value in values]  # little endian: an int32 is the low half
        arguments = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        getattr(library, f"run_{call.function}")(arguments, *call.grid, call.threads)
    return outputs


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tensor, ...]]:
    """`on_host(op_name, *tensors, reverse=False)`: the op's kernels, run thread by thread on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels as host C++")
    return partial(run_on_host, folder=tmp_path_factory.mktemp("host_kernels"))
