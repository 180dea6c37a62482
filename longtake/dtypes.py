"""Element types: our name of each, and what torch, NumPy, ONNX, TensorRT and safetensors call it.

Nothing but this table is loaded here: torch and NumPy are imported when a type of theirs is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch


@dataclass(frozen=True)
class DType:
    """One element type.

    onnx: its number in TensorProto.DataType. trt: its name in TensorRT's DataType. safetensors: its name in a header.
    "" where there is no such name; what torch has no name for travels as int8 bytes.
    """

    name: str
    bits: int
    torch_name: str
    numpy_name: str
    onnx: int
    trt: str = ""
    safetensors: str = ""

    @property
    def torch(self) -> torch.dtype:
        import torch

        return getattr(torch, self.torch_name)

    @property
    def numpy(self) -> numpy.dtype:
        import ml_dtypes
        import numpy

        return numpy.dtype(getattr(ml_dtypes, self.numpy_name, self.numpy_name))

    @property
    def host(self) -> DType:
        """What a network that runs on the CPU takes it as: bf16 numbers in fp32."""
        return DTYPES["fp32"] if self.name == "bf16" else self

    def bytes(self, elements: int) -> int:
        """Bytes of that many elements, whole ones."""
        return -(-elements * self.bits // 8)


_TABLE = (
    DType("fp64", 64, "float64", "float64", 11, "", "F64"),
    DType("fp32", 32, "float32", "float32", 1, "FLOAT", "F32"),
    DType("fp16", 16, "float16", "float16", 10, "HALF", "F16"),
    DType("bf16", 16, "bfloat16", "bfloat16", 16, "BF16", "BF16"),
    DType("fp8", 8, "float8_e4m3fn", "float8_e4m3fn", 17, "FP8", "F8_E4M3"),
    DType("fp8_e5m2", 8, "float8_e5m2", "float8_e5m2", 19, "", "F8_E5M2"),
    DType("fp4", 4, "", "float4_e2m1fn", 23, "FP4"),
    DType("int64", 64, "int64", "int64", 7, "INT64", "I64"),
    DType("int32", 32, "int32", "int32", 6, "INT32", "I32"),
    DType("int16", 16, "int16", "int16", 5, "", "I16"),
    DType("int8", 8, "int8", "int8", 3, "INT8", "I8"),
    DType("int4", 4, "", "int4", 22),
    DType("uint64", 64, "uint64", "uint64", 13, "", "U64"),
    DType("uint32", 32, "uint32", "uint32", 12, "", "U32"),
    DType("uint16", 16, "uint16", "uint16", 4, "", "U16"),
    DType("uint8", 8, "uint8", "uint8", 2, "", "U8"),
    DType("uint4", 4, "", "uint4", 21),
    DType("bool", 8, "bool", "bool", 9, "BOOL", "BOOL"),
)
DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _TABLE}
BY_ONNX: dict[int, DType] = {dtype.onnx: dtype for dtype in _TABLE}
BY_TRT: dict[str, DType] = {dtype.trt: dtype for dtype in _TABLE if dtype.trt}
BY_SAFETENSORS: dict[str, DType] = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors}
_BY_TORCH = {f"torch.{dtype.torch_name}": dtype for dtype in _TABLE if dtype.torch_name}
# A weight or a cache in four bits: E2M1 numbers, and an E4M3 scale in every 16.
_STORED_BITS = {"nvfp4": 4.5, "w4a16": 4.5}


def of_torch(dtype: torch.dtype) -> DType:
    """The element type that torch calls `dtype`."""
    return _BY_TORCH[str(dtype)]


def stored_bytes(form: str) -> float:
    """Bytes that an element takes as it is stored: `form` is a precision, a cache format or an element type."""
    return (_STORED_BITS[form] if form in _STORED_BITS else DTYPES[form].bits) / 8
