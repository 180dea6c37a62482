"""What is in a safetensors file, read from its header alone, and in the JSON beside it."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from longtake.errors import IntegrityError
from longtake.files import read_json, sha256

LARGEST_HEADER = 100_000_000  # the format's own limit, in bytes


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: {tensor: {dtype, shape, data_offsets}, "__metadata__": {...}}.

    Raises:
        IntegrityError: the file is truncated, too long, or no safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as source:
        start = source.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise _broken(path, f"a header of {length} bytes in a file of {size}", "a safetensors header")
        text = source.read(length)
    try:
        header = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _broken(path, f"an unreadable header ({error})", "a safetensors header") from None
    if size != 8 + length + end:
        raise _broken(path, f"{size} bytes", f"{8 + length + end} bytes, as its header says")
    return header


def _broken(path: Path, got: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not a whole safetensors file", got=got, expected=expected, fix="restore the file or train again"
    )


def describe_safetensors(path: Path) -> dict[str, Any]:
    """Facts about a checkpoint: tensors, parameters and bytes by dtype, metadata, and the JSON beside it.

    Raises:
        IntegrityError: the file is not whole, or its digest differs from the one in the JSON beside it.
    """
    header = safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    by_type: dict[str, dict[str, int]] = {}
    for entry in header.values():
        kind = by_type.setdefault(entry["dtype"], {"tensors": 0, "elements": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["elements"] += math.prod(entry["shape"])
        kind["bytes"] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return {
        "kind": "checkpoint (safetensors)",
        "tensors": len(header),
        "elements": sum(kind["elements"] for kind in by_type.values()),
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
