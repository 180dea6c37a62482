"""Built engines by the name of the backend that runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longtake.runtime.backends.base import Backend
from longtake.runtime.backends.trt import fused, segmented

LOADERS = {"fused": fused.open_backend, "segmented": segmented.open_backend}


def backend_from_engines(backend: str, folder: Path, **options: Any) -> Backend:
    """Open the engines in `folder` with `backend`, a recipe's mode; `options` are its `open_backend`'s."""
    return LOADERS[backend](folder, **options)
