"""Reading an exported ONNX file without loading its weights: the graph, one weight at a time, the digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_model, load_external_data_for_tensor, uses_external_data

from longtake.dtypes import BY_ONNX
from longtake.errors import IntegrityError, LongtakeError

# The constants asked for, one after the other in the dtype stored: from a file, or made up on the device.
WeightSource = Callable[[set[str]], Iterator[tuple[str, torch.Tensor]]]
RE_EXPORT = "export it again: longtake export --force"


def data_files(path: Path) -> list[Path]:
    """The ONNX file and its external data file, if it has one."""
    data = path.with_name(path.name + ".data")
    return [path, data] if data.is_file() else [path]


def onnx_digest(path: Path) -> str:
    """SHA-256 over the graph and its weights."""
    digest = hashlib.sha256()
    for file in data_files(path):
        with open(file, "rb") as source:
            while piece := source.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def read_graph(path: Path) -> onnx.ModelProto:
    """The model with small constants only; larger ones stay in the data file.

    Raises:
        LongtakeError: the file does not exist.
        IntegrityError: it, or its data file, is damaged.
    """
    if not path.is_file():
        raise LongtakeError(f"{path} does not exist", fix="export it: longtake export --recipe NAME")
    try:
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL and _extent(tensor)[2] <= WEIGHT_BYTES:
                load_external_data_for_tensor(tensor, str(path.parent))
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
    except Exception as error:  # protobuf and onnx raise their own types for damaged files
        raise IntegrityError(
            f"{path} is not a readable ONNX model", got=f"{type(error).__name__}: {error}", fix=RE_EXPORT
        ) from None
    return model


def _extent(tensor: TensorProto) -> tuple[str, int, int]:
    place = {entry.key: entry.value for entry in tensor.external_data}
    return place["location"], int(place.get("offset", 0)), int(place.get("length", 0))


def weights_from_onnx(path: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named constants one after the other, as CPU tensors in the dtype stored (4-bit data as int8 bytes).

    Raises:
        IntegrityError: one is missing or cut short.
    """
    model = read_graph(path)
    constants = constants_of(model)
    if missing := names - constants.keys():
        raise IntegrityError(f"{path} lacks weights", got=sorted(missing)[:3], fix=RE_EXPORT)
    for name in sorted(names):
        yield name, _tensor(constants[name], path)


def _tensor(tensor: TensorProto, path: Path) -> torch.Tensor:
    dtype = BY_ONNX.get(tensor.data_type)
    if dtype is None or not dtype.torch_name:
        raise LongtakeError(f"weight {tensor.name} has a dtype engines are not fed with", got=tensor.data_type)
    if tensor.data_location == TensorProto.EXTERNAL:
        location, offset, length = _extent(tensor)
        raw = np.fromfile(path.parent / location, dtype=np.uint8, count=length, offset=offset)
        if raw.nbytes != length:
            raise IntegrityError(f"{location} is too short for {tensor.name}", got=raw.nbytes, expected=length)
    else:
        content = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        raw = np.frombuffer(content, dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(dtype.torch).reshape(tuple(tensor.dims))


def read_onnx(path: Path, content: bool = True) -> onnx.ModelProto:
    """Read an ONNX file, with its external data unless `content` is False.

    Raises:
        LongtakeError: the file is missing.
        IntegrityError: it is no ONNX file, or (if content is read) its data file is missing or too short.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        if content:
            for tensor in model.graph.initializer:
                if uses_external_data(tensor):
                    _check_extent(tensor, path)
            load_external_data_for_model(model, str(path.parent))
    except FileNotFoundError as error:
        raise LongtakeError(f"{error.filename or path} does not exist", fix="run `longtake export`") from None
    except LongtakeError:
        raise
    except Exception as error:  # protobuf and onnx raise their own types for damaged files
        raise IntegrityError(
            f"{path} is not a readable ONNX model",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            expected="a file written by `longtake export`",
            fix="run `longtake export --force`",
        ) from None
    return model


def _check_extent(tensor: onnx.TensorProto, path: Path) -> None:
    place = {entry.key: entry.value for entry in tensor.external_data}
    data, end = path.parent / place["location"], int(place.get("offset", 0)) + int(place.get("length", 0))
    size = data.stat().st_size
    if size < end:
        raise IntegrityError(
            f"{data} is too short for tensor {tensor.name}",
            got=f"{size} bytes",
            expected=f"at least {end} bytes",
            fix="run `longtake export --force`",
        )


WEIGHT_BYTES = 1024  # a constant above this becomes an input


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
