"""What is in a safetensors file, read from its header alone, and in the JSON beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from longtake.dtypes import BY_SAFETENSORS
from longtake.errors import IntegrityError
from longtake.files import read_json, sha256
from longtake.formats.describe_onnx import weights_by_type
from longtake.tensor_file import tensors_in


def describe_safetensors(path: Path) -> dict[str, Any]:
    """Facts about a checkpoint: tensors, parameters and bytes by dtype, metadata, and the JSON beside it.

    Raises:
        IntegrityError: the file is not whole, or its digest differs from the one in the JSON beside it.
    """
    with tensors_in(path, framework="np") as file:
        metadata, names = file.metadata() or {}, file.keys()
        slices = ((tensor.get_dtype(), math.prod(tensor.get_shape())) for tensor in map(file.get_slice, names))
        by_type = weights_by_type((kind, count, BY_SAFETENSORS[kind].bytes(count)) for kind, count in slices)
    return {
        "kind": "checkpoint (safetensors)",
        "tensors": len(names),
        "elements": sum(row["elements"] for row in by_type.values()),
        "weights": by_type,
        "metadata": metadata,
        **_sidecar(path),
    }


def _sidecar(path: Path) -> dict[str, Any]:
    side = path.with_suffix(".json")
    if not side.is_file():
        return {"description": f"none ({side.name} is not beside it)"}
    described = read_json(side)
    if not isinstance(described, dict):
        raise IntegrityError(f"{side} is not a checkpoint description", got=type(described).__name__, expected="a map")
    expected = described.get("sha256")
    if isinstance(expected, str) and (got := sha256(path)) != expected:
        raise IntegrityError(
            f"{path} is not the file that {side.name} describes",
            got=f"sha256 {got}",
            expected=f"sha256 {expected}",
            fix="restore the pair that belongs together, or train again",
        )
    return {"description": described, "digest": "matches" if expected else "not given"}
