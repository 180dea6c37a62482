"""The one reader of ONNX files: the graph with all, the small or none of its constants, one weight at a time, the digest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from longtake.dtypes import BY_ONNX, DTYPES
from longtake.errors import IntegrityError, LongtakeError

INLINE_BYTES = 1024  # up to here a constant stays in the graph file and in a segment; above, it is a segment's input
# The constants asked for, one after the other in the dtype stored: from a file, or made up on the device.
WeightSource = Callable[[set[str]], Iterator[tuple[str, torch.Tensor]]]
RE_EXPORT = "export it again (longtake export --force), or restore the file"


def data_path(path: Path) -> Path:
    """The external data file of an ONNX file: `dit.onnx` has `dit.onnx.data`."""
    return path.with_name(path.name + ".data")


def data_files(path: Path) -> list[Path]:
    """The ONNX file and its external data file, if it has one."""
    return [file for file in (path, data_path(path)) if file == path or file.is_file()]


def onnx_digest(path: Path) -> str:
    """SHA-256 over the graph and its weights."""
    digest = hashlib.sha256()
    for file in data_files(path):
        with open(file, "rb") as source:
            while piece := source.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def read_onnx(path: Path, content: Literal["all", "small", "none"] = "all") -> onnx.ModelProto:
    """Read an ONNX file and, of what lies in its data file, everything, constants up to INLINE_BYTES, or nothing.

    Raises:
        LongtakeError: the file does not exist.
        IntegrityError: it is no whole ONNX file, or its data file is missing or too short for what is to be read.
    """
    if not path.is_file():
        raise LongtakeError(f"{path} does not exist", fix="export it: longtake export --recipe NAME")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.output or not model.opset_import:
            raise ValueError("no graph outputs or no opset")
        if content == "all":
            data_sizes(model, path)
        for tensor in model.graph.initializer if content != "none" else ():
            if uses_external_data(tensor) and (content == "all" or tensor_bytes(tensor) <= INLINE_BYTES):
                load_external_data_for_tensor(tensor, str(path.parent))
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
    except IntegrityError:
        raise
    except Exception as error:  # protobuf and onnx raise their own types for damaged files
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise IntegrityError(f"{path} is not a readable ONNX model", got=got, expected="a file written by `longtake export`",
                             fix=RE_EXPORT) from None  # fmt: skip
    return model


def tensor_elements(tensor: TensorProto) -> int:
    """Elements of `tensor`, whose content need not be there."""
    return math.prod(tensor.dims)


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes that `tensor` takes on disk (two 4-bit elements a byte)."""
    return BY_ONNX.get(tensor.data_type, DTYPES["fp32"]).bytes(tensor_elements(tensor))


def data_sizes(model: onnx.ModelProto, path: Path) -> dict[str, int]:
    """{data file: bytes it holds} of the model in `path`.

    Raises:
        IntegrityError: a data file is missing, too short, or outside the folder.
    """
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if not uses_external_data(tensor):
            continue
        name, offset, length = _place(tensor, path)
        data, end = path.parent / name, offset + length
        if name not in sizes:
            sizes[name] = data.stat().st_size if data.is_file() else -1
        if sizes[name] < end:
            short = f"is too short for tensor {tensor.name}: {sizes[name]} bytes"
            got, expected = f"{data} {short if sizes[name] >= 0 else 'does not exist'}", f"at least {end} bytes"
            what = f"the weights of {path.name} are missing or truncated"
            raise IntegrityError(what, got=got, expected=expected, fix=RE_EXPORT)
    return sizes


def _place(tensor: TensorProto, path: Path) -> tuple[str, int, int]:
    """Where the content of `tensor` lies: data file, offset, length."""
    entry = {pair.key: pair.value for pair in tensor.external_data}
    name = entry["location"]
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise IntegrityError(f"{path} names weights outside its folder", got=name, expected="a file beside it")
    return name, int(entry.get("offset", 0)), int(entry.get("length", tensor_bytes(tensor)))


def weights_from_onnx(path: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named constants one after the other, as CPU tensors in the dtype stored (4-bit data as int8 bytes).

    Raises:
        IntegrityError: one is missing or cut short.
    """
    constants = constants_of(read_onnx(path, "small"))
    if missing := names - constants.keys():
        raise IntegrityError(f"{path} lacks weights", got=sorted(missing)[:3], fix=RE_EXPORT)
    for name in sorted(names):
        yield name, tensor_value(constants[name], path)


def tensor_value(tensor: TensorProto, path: Path) -> torch.Tensor:
    """The content of one constant of the model in `path`, in memory of its own."""
    dtype = BY_ONNX.get(tensor.data_type)
    if dtype is None or not dtype.torch_name:
        raise LongtakeError(f"weight {tensor.name} has a dtype engines are not fed with", got=tensor.data_type)
    if uses_external_data(tensor):
        name, offset, length = _place(tensor, path)
        raw = np.fromfile(path.parent / name, dtype=np.uint8, count=length, offset=offset)
        if raw.nbytes != length:
            raise IntegrityError(f"{name} is too short for {tensor.name}", got=raw.nbytes, expected=length)
    else:
        content = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        raw = np.frombuffer(content, dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(dtype.torch).reshape(tuple(tensor.dims))


def constants_of(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Every constant of the graph by tensor name: initializers and the values of Constant nodes."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            tensor = TensorProto()
            tensor.CopyFrom(_constant_value(node))
            tensor.name = node.output[0]
            found[tensor.name] = tensor
    return found


def _constant_value(node: NodeProto) -> TensorProto:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return value
    kinds = {"value_int": TensorProto.INT64, "value_ints": TensorProto.INT64}
    kind = kinds.get(attribute.name, TensorProto.FLOAT)
    values = list(value) if attribute.name.endswith("s") else [value]
    return helper.make_tensor("", kind, [len(values)] if attribute.name.endswith("s") else [], values)
