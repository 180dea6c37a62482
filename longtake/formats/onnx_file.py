"""The one reader of ONNX files: the graph with all, the small or none of its constants, one weight at a time, the digest."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from longtake.dtypes import BY_ONNX, DTYPES
from longtake.errors import IntegrityError, LongtakeError
from longtake.out_of_memory import is_out_of_memory, out_of_memory

INLINE_BYTES = 1024  # up to here a constant stays in the graph file and in a segment; above, it is a segment's input
# The constants asked for, one after the other in the dtype stored: from a file, or made up on the device.
WeightSource = Callable[[set[str]], Iterator[tuple[str, torch.Tensor]]]
MOST_ELEMENTS = 1 << 48  # of a constant
NUMBER = re.compile(r"[0-9]{1,18}")
UNUSED_TYPES = tuple(range(1, 27))  # known to ONNX; none of them is a weight of ours
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
    with readable(path):
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.output or not model.opset_import:
            raise ValueError("no graph outputs or no opset")
        beside: set[str] = set()
        for tensor in all_tensors(model):
            _check_tensor(tensor, path, beside)
        if content == "all":
            data_sizes(model, path)
        for tensor in model.graph.initializer if content != "none" else ():
            if uses_external_data(tensor) and (content == "all" or tensor_bytes(tensor) <= INLINE_BYTES):
                load_external_data_for_tensor(tensor, str(path.parent))
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
    return model


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Inside, what is raised because the ONNX file at `path` is damaged becomes an IntegrityError."""
    try:
        yield
    except LongtakeError:
        raise
    except Exception as error:  # protobuf and onnx raise their own types for damaged files
        if is_out_of_memory(error):
            raise out_of_memory(error, f"reading {path}") from None
        got = f"{type(error).__name__}: {str(error)[:200]}"
        what = f"{path} is not a readable ONNX model"
        raise IntegrityError(what, got=got, expected="a file written by `longtake export`", fix=RE_EXPORT) from None


def all_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every constant of a model: of the graph, of its nodes' attributes and their graphs, of its functions' bodies."""
    graphs: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for attribute in (each for node in graph.node for each in node.attribute):
            yield from (attribute.t, *attribute.tensors)[not attribute.HasField("t") :]
            graphs += (attribute.g, *attribute.graphs)[not attribute.HasField("g") :]


def _check_tensor(tensor: TensorProto, path: Path, beside: set[str]) -> None:
    """Raise if a constant has a type, a size or a place that none can have."""
    if tensor.data_type not in BY_ONNX and tensor.data_type not in UNUSED_TYPES:
        raise ValueError(f"tensor {tensor.name!r:.80} is of type {tensor.data_type}")
    if any(not 0 <= size < MOST_ELEMENTS for size in tensor.dims) or tensor_elements(tensor) >= MOST_ELEMENTS:
        raise ValueError(f"tensor {tensor.name!r:.80} is of shape {list(tensor.dims)!s:.80}")
    if uses_external_data(tensor):
        beside.add(_place(tensor, path, beside)[0])


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


def _place(tensor: TensorProto, path: Path, beside: Collection[str] = ()) -> tuple[str, int, int]:
    """Where the content of `tensor` lies: data file, offset, length. beside: files known to lie in the folder."""
    entry = {pair.key: pair.value for pair in tensor.external_data}
    name, wanted = entry.get("location", ""), tensor_bytes(tensor)
    numbers = (entry.get("offset", "0"), entry.get("length", str(wanted)))
    if not name or not all(NUMBER.fullmatch(number) for number in numbers) or int(numbers[1]) != wanted:
        raise IntegrityError(
            f"{path} says of a weight where it lies in a way that cannot be",
            got=f"{tensor.name[:60]}: location {name[:60]!r}, offset {numbers[0][:24]}, length {numbers[1][:24]}",
            expected=f"a file beside it, an offset, and a length of {wanted} bytes",
            fix=RE_EXPORT,
        )
    if name not in beside and not _is_beside(path, name):
        raise IntegrityError(
            f"{path} names weights outside its folder", got=name[:200], expected="a file beside it", fix=RE_EXPORT
        )
    return name, int(numbers[0]), int(numbers[1])


def _is_beside(path: Path, name: str) -> bool:
    """Whether file `name` lies in the folder of `path`: as it is called, and as links lead to it."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        return False
    file = (path.parent / name).resolve()
    return any(file.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent))


def weights_from_onnx(path: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named constants one after the other, as CPU tensors in the dtype stored (4-bit data as int8 bytes).

    Raises:
        IntegrityError: one is missing or cut short.
    """
    model = read_onnx(path, "small")
    with readable(path):
        constants = constants_of(model)
    if missing := names - constants.keys():
        raise IntegrityError(f"{path} lacks weights", got=sorted(missing)[:3], fix=RE_EXPORT)
    for name in sorted(names):
        yield name, tensor_value(constants[name], path)


def tensor_value(tensor: TensorProto, path: Path) -> torch.Tensor:
    """The content of one constant of the model in `path`, in memory of its own."""
    dtype = BY_ONNX.get(tensor.data_type)
    if dtype is None or not dtype.torch_name:
        raise LongtakeError(f"weight {tensor.name} has a dtype engines are not fed with", got=tensor.data_type)
    return torch.from_numpy(tensor_content(tensor, path)).view(dtype.torch).reshape(tuple(tensor.dims))


def tensor_content(tensor: TensorProto, path: Path) -> np.ndarray:
    """The bytes [n] of one constant of the model in `path`, of any dtype, in memory of their own."""
    if uses_external_data(tensor):
        name, offset, length = _place(tensor, path)
        with readable(path):
            raw = np.fromfile(path.parent / name, dtype=np.uint8, count=length, offset=offset)
        if raw.nbytes != length:
            raise IntegrityError(
                f"{name} is too short for {tensor.name}", got=raw.nbytes, expected=length, fix=RE_EXPORT
            )
    else:
        with readable(path):
            content = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        raw = np.frombuffer(content, dtype=np.uint8).copy()
        if raw.nbytes != tensor_bytes(tensor):
            raise IntegrityError(
                f"{path} holds another size of {tensor.name} than it says",
                got=raw.nbytes,
                expected=tensor_bytes(tensor),
                fix=RE_EXPORT,
            )
    return raw


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
