"""The table of element types says what each library says of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from onnx import helper
from safetensors.torch import load, save

from longtake.dtypes import BY_ONNX, DTYPES, DType, of_torch, stored_bytes

every = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
in_torch = [dtype for dtype in DTYPES.values() if dtype.torch_name]


@every
def test_numpy_and_onnx_agree(dtype: DType) -> None:
    assert helper.tensor_dtype_to_np_dtype(dtype.onnx) == dtype.numpy
    assert BY_ONNX[dtype.onnx] is dtype


@pytest.mark.parametrize("dtype", in_torch, ids=lambda dtype: dtype.name)
def test_torch_and_safetensors_agree(dtype: DType) -> None:
    assert of_torch(dtype.torch) is dtype and dtype.torch.itemsize * 8 == dtype.bits
    written = save({"x": torch.zeros(3).to(dtype.torch)})
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    assert header["x"]["dtype"] == dtype.safetensors
    assert load(written)["x"].dtype == dtype.torch


def test_sizes() -> None:
    assert (DTYPES["fp4"].bytes(3), DTYPES["bf16"].bytes(3), DTYPES["bool"].bytes(3)) == (2, 6, 3)
    assert (stored_bytes("nvfp4"), stored_bytes("w4a16"), stored_bytes("fp8"), stored_bytes("bf16")) == (
        9 / 16, 9 / 16, 1, 2,
    )  # fmt: skip
    assert [DTYPES[name].host.name for name in ("bf16", "fp32", "int8")] == ["fp32", "fp32", "int8"]


def test_the_table_loads_no_library() -> None:
    check = "import sys, longtake.dtypes; print({'torch', 'numpy', 'onnx', 'tensorrt'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
