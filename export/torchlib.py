"""The exporter's own translations, read once a process: torch parses their sources at every export, for a second each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_read: dict[int, Any] = {}  # opset -> torch's registry of translations


@contextmanager
def read_once() -> Iterator[None]:
    """Exports inside take a copy of what the first one has read; each adds custom translations to its own."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    kind: Any = ONNXRegistry
    reads = kind.from_torchlib

    def registry(opset_version: int) -> Any:
        if opset_version not in _read:
            _read[opset_version] = reads(opset_version)
        found = copy.copy(_read[opset_version])
        found.functions = {target: list(known) for target, known in found.functions.items()}
        return found

    before = kind.__dict__["from_torchlib"]
    kind.from_torchlib = staticmethod(registry)
    try:
        yield
    finally:
        kind.from_torchlib = before
