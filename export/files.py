"""ONNX files with external data: both files whole or absent, bytes the same for the same model."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_model, set_external_data, uses_external_data

from longtake.runtime.errors import IntegrityError, LongtakeError
from longtake.runtime.files import atomic_path

ALIGNMENT = 64
INLINE_BYTES = 256  # smaller tensors (shapes, scalars) stay in the graph file, where tools can read them


def data_path(path: Path) -> Path:
    """The external data file of an ONNX file: `dit.onnx` has `dit.onnx.data`."""
    return path.with_name(path.name + ".data")


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` as `path` plus `path`.data, atomically. `model` is left with its tensors referring to the data."""
    with atomic_path(data_path(path)) as partial, open(partial, "wb") as data:
        for tensor in model.graph.initializer:
            if not tensor.HasField("raw_data") or len(tensor.raw_data) < INLINE_BYTES:
                continue
            data.write(b"\0" * (-data.tell() % ALIGNMENT))
            set_external_data(tensor, data_path(path).name, data.tell(), len(tensor.raw_data))
            data.write(tensor.raw_data)
            tensor.ClearField("raw_data")
    with atomic_path(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external data.

    Raises:
        LongtakeError: the file is missing.
        IntegrityError: it is no ONNX file, or its data file is missing or too short.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
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
