"""ONNX Runtime sessions on the CPU over exported views.

Sessions fold constants: weights are dequantized once, when the session is made. For a view of several hundred megabytes
that takes a minute and ten times the file in memory, more than the few passes of a comparison gain by it, so there the
weights are dequantized in each pass, one at a time. The arithmetic is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.out_of_memory import is_out_of_memory, out_of_memory
from longtake.settings import settings_from_environment

if TYPE_CHECKING:
    import onnxruntime

LARGE = 256 << 20  # bytes of a view whose constants stay as they are in sessions of a few passes


def session_from_view(
    path: Path, threads: int | None = None, *, few_passes: bool = False
) -> onnxruntime.InferenceSession:
    """A session over the view at `path`.

    Args:
        threads: default: LONGTAKE_THREADS.
        few_passes: whether a large view may dequantize its weights in each pass, which takes far less memory.

    Raises:
        LongtakeError: there is no view: the network is too large for one.
        IntegrityError: ONNX Runtime cannot open it.
        UnavailableError: ONNX Runtime is not installed.
    """
    if not path.is_file():
        what = f"ONNX Runtime cannot run {path.name.removesuffix('.ort.onnx')}: no {path}"
        got, expected = "a network too large for one ONNX message (2 GiB)", "a view that `longtake export` writes"
        fix = "run engines on a GPU, or a preset of the same widths and fewer layers (wan2.2-ti2v-5b-check)"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return _session(str(path), path.stat().st_size, f"{path}", threads, few_passes)


def session_from_model(model: onnx.ModelProto, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A session over a view in memory, for a few passes. Raises as `session_from_view`."""
    raw = model.SerializeToString()
    return _session(raw, len(raw), model.graph.name, threads, True)


def _session(
    source: str | bytes, size: int, what: str, threads: int | None, few_passes: bool
) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError:
        raise UnavailableError("ONNX Runtime is not installed", fix="pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings_from_environment().threads if threads is None else threads
    options.log_severity_level = 3
    left_out = ["ConstantFolding"] if few_passes and size > LARGE else []
    try:
        return onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
        )
    except Exception as error:  # ONNX Runtime raises its own types, without a common public base
        if is_out_of_memory(error):
            raise out_of_memory(error, f"opening {what}") from None
        got, fix = f"{type(error).__name__}: {str(error)[:300]}", "run `longtake export --force`"
        expected = "a file written by `longtake export`"
        raise IntegrityError(f"ONNX Runtime cannot open {what}", got=got, expected=expected, fix=fix) from None
