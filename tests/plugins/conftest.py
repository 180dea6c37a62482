"""A stand-in for the GPU: the launcher runs the same .cu text as host C++, thread by thread, on the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import run_folder
from torch import Tensor

from longtake.plugins import driver
from longtake.plugins.launch import Launcher
from longtake.plugins.nvrtc import INCLUDE
from longtake.plugins.registry import op_named
from longtake.plugins.shapes import dims_from_shapes, shape_of, torch_dtype

HERE = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC")


@cache
def host_library(source: Path, functions: tuple[str, ...], options: tuple[str, ...], folder: Path) -> Any:
    """The kernels of `source` as a shared library with a `run_<function>` each."""
    name = f"{source.parent.name}_{source.stem}_{zlib.crc32(repr((functions, options)).encode()):08x}"
    library, own = folder / f"{name}.so", f"{name}_{os.getpid()}"
    if not library.exists():
        exports = "".join(f"EXPORT({function})\n" for function in functions)
        (folder / f"{own}.cpp").write_text(f'#include "host_cuda.h"\n#include "{source}"\n{exports}')
        command = ["g++", *FLAGS, "-shared", f"-I{HERE}", f"-I{INCLUDE}", *options, f"{own}.cpp", "-o", f"{own}.so"]
        subprocess.run(command, cwd=folder, check=True)
        (folder / f"{own}.so").rename(library)
    return ctypes.CDLL(str(library))


class HostDevice:
    """Takes the place of plugins/driver.py. `reverse`: let the last thread of a block go first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reverse = False
        self.launches: list[tuple[int, int]] = []  # (stream, threads of a block)

    def prepare(self, launcher: Launcher) -> Launcher:
        kernel, calls = launcher.kernel, launcher.kernel.calls(launcher.dims)
        macros = {**kernel.macros(launcher.dims), "COMPUTE_BF16": int(launcher.dtype == "bf16")}
        options = [f"-D{name}={value}" for name, value in macros.items()]
        names = tuple(call.function for call in calls)
        library = host_library(kernel.source, names, tuple(options), self.folder)
        launcher._functions = [getattr(library, f"run_{name}") for name in names]
        return launcher

    def launch(
        self,
        function: Any,
        grid: tuple[int, int],
        threads: int,
        stream: int,
        values: Sequence[int],
        shared_bytes: int = 0,
    ) -> None:
        boxes = [ctypes.c_int64(value) for value in values]  # little endian: an int32 is the low half
        function(
            (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes)), *grid, threads, self.reverse
        )
        self.launches.append((stream, threads))

    def run(self, op_name: str, *tensors: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """Like launch.run_kernel, on CPU tensors. What is not written in place, or `out`, starts poisoned."""
        spec = op_named(op_name).spec
        dims = dims_from_shapes(spec, [t.shape for t in tensors])
        launcher = Launcher(op_named(op_name), dims, "fp32" if tensors[0].dtype == torch.float32 else "bf16")
        aliases, nan = dict(spec.aliases), float("nan")
        outputs = tuple(
            tensors[aliases[i]]
            if i in aliases
            else out
            if out is not None
            else torch.full(shape_of(t, dims), nan).to(torch_dtype(t, launcher.dtype))
            for i, t in enumerate(spec.outputs)
        )
        workspace = torch.full((max(launcher.workspace_bytes, 1),), 0x7F, dtype=torch.uint8)
        pointers = [t.data_ptr() for t in (*tensors, *outputs)]
        launcher.launch(pointers, 0, workspace.data_ptr(), dims.get("W", 0))
        return outputs


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels as host C++")
    folder, own = run_folder(tmp_path_factory, "host_kernels"), f"{os.getpid()}.gch"
    header = ["-x", "c++-header", str(HERE / "host_cuda.h"), "-o", own]  # compiled once, found before the header itself
    subprocess.run(["g++", *FLAGS, *header], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    (folder / own).rename(folder / "host_cuda.h.gch")
    return folder


@pytest.fixture()
def host_device(host_folder: Path, monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    device = HostDevice(host_folder)
    monkeypatch.setattr(Launcher, "prepare", lambda launcher: device.prepare(launcher))
    monkeypatch.setattr(driver, "launch", device.launch)
    monkeypatch.setattr(driver, "ensure_context", lambda: 0)
    return device
