"""ONNX files with external data: both files whole or absent, bytes the same for the same model.

A tensor without content is a reference: name, type and shape, marked external. Its content is given when the files are
written, one tensor at a time, so a model of any size is written in the memory of its largest tensor. A skeleton is the
graph file alone, its references pointing into a data file that is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.files import atomic_path
from longtake.formats.onnx_file import INLINE_BYTES, data_path, tensor_bytes

ALIGNMENT = 64

Content = Iterable[tuple[str, Tensor]]


def write_onnx(model: onnx.ModelProto, path: Path, content: Content = ()) -> None:
    """Write `model` as `path` plus `path`.data, atomically. `model` is left with its tensors referring to the data.

    Args:
        content: (initializer name, tensor of as many bytes as it takes) for every reference in `model`, in any order;
            used up one by one.

    Raises:
        LongtakeError: content is missing, of another size, or for a tensor that needs none.
    """
    wanted = {t.name: t for t in model.graph.initializer if is_reference(t)}
    places = lay_out(model, path)
    with atomic_path(data_path(path)) as partial, open(partial, "wb") as data:
        for name, raw in _raw(model, places, content, wanted):
            data.seek(places[name])
            data.write(raw)
        if wanted:
            fix = "give the checkpoint that the graph was exported for"
            raise LongtakeError(f"no content for {len(wanted)} tensors of {path.name}", got=sorted(wanted)[:3], fix=fix)
    _write_graph(model, path)


def write_skeleton(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph file alone. References up to INLINE_BYTES get placeholder content; the rest keep their places."""
    for tensor in model.graph.initializer:
        if is_reference(tensor) and tensor_bytes(tensor) <= INLINE_BYTES:
            _set_inline(tensor, placeholder(tensor))
    lay_out(model, path, references_only=True)
    _write_graph(model, path)
    data_path(path).unlink(missing_ok=True)  # of an earlier export: its weights are not this graph's


def is_reference(tensor: TensorProto) -> bool:
    """Whether `tensor` has no content and no place yet."""
    return tensor.data_location == TensorProto.EXTERNAL and not tensor.external_data


def lay_out(model: onnx.ModelProto, path: Path, references_only: bool = False) -> dict[str, int]:
    """Give every initializer above INLINE_BYTES its place in the data file; name -> offset."""
    end, places = 0, {}
    for tensor in model.graph.initializer:
        size = tensor_bytes(tensor)
        stored = is_reference(tensor) or (tensor.HasField("raw_data") and not references_only)
        if size <= INLINE_BYTES or not stored:
            continue
        end += -end % ALIGNMENT
        places[tensor.name] = end
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", data_path(path).name), ("offset", end), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        end += size
    return places


def _raw(
    model: onnx.ModelProto, places: dict[str, int], content: Content, wanted: dict[str, TensorProto]
) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) for the data file: what the graph itself holds, then `content`, of which small ones stay inline."""
    for tensor in model.graph.initializer:
        if tensor.name in places and tensor.name not in wanted:
            raw = tensor.raw_data
            tensor.ClearField("raw_data")
            yield tensor.name, raw
    for name, value in content:
        if name not in wanted:
            raise LongtakeError(f"no initializer waits for {name}", expected=f"one of {sorted(wanted)[:3]} and so on")
        reference, raw = wanted.pop(name), tensor_raw(value)
        if len(raw) != tensor_bytes(reference):
            expected = f"{tensor_bytes(reference)} bytes for {list(reference.dims)}"
            raise LongtakeError(f"content of {name} has another size", got=f"{len(raw)} bytes", expected=expected)
        if name in places:
            yield name, raw
        else:
            _set_inline(reference, raw)


def tensor_raw(value: Tensor) -> bytes:
    """The bytes of a tensor of any dtype, row by row."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _set_inline(tensor: TensorProto, raw: bytes) -> None:
    tensor.ClearField("data_location")
    tensor.raw_data = raw


def placeholder(tensor: TensorProto) -> bytes:
    """Plausible content of a small reference: ones, and for scales of weights values that differ by name, as real ones
    do (equal ones would be merged into segments)."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    value = 1.0
    if tensor.name.endswith("scale"):
        value = 1e-5 * (1 + int(hashlib.sha256(tensor.name.encode()).hexdigest()[:4], 16) / 65536)
    return np.full(tuple(tensor.dims), value).astype(kind).tobytes()


def _write_graph(model: onnx.ModelProto, path: Path) -> None:
    with atomic_path(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))
