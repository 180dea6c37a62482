"""Built engines, opened by the name of the backend that runs them.

Plans for "fused" are built and checked; it was not run: no GPU that TensorRT-RTX 1.7 supports was at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longtake.errors import UnavailableError
from longtake.formats.bundle import Bundle
from longtake.machine.flavour import flavour_here
from longtake.runtime.backends.trt.backend import TrtBackend


def backend_from_engines(
    backend: str,
    folder: Path,
    device: torch.device | None = None,
    reason: str = "asked for",
    cuda_graphs: bool = True,
    **options: Any,
) -> TrtBackend:
    """Open the engines in `folder` with `backend`, a recipe's mode: "segmented" (graphs cut at the custom ops, for TensorRT
    flavours that cannot load plugins) or "fused" (plugins inside the engine, registered before anything is deserialised).

    Raises:
        UnavailableError: no GPU, another GPU or TensorRT than they were built for, or built for the other backend.
        IntegrityError: a file is damaged or was swapped.
    """
    bundle = Bundle.read(folder)
    if bundle.recipe.mode != backend:
        raise UnavailableError(
            f"{folder} was not built for backend {backend}",
            got=f"recipe {bundle.recipe.name}, built {bundle.recipe.mode}",
            expected=f"a recipe with mode: {backend}",
            fix=f"use --backend {bundle.recipe.mode}, or build another recipe",
        )
    flavour = flavour_here()
    if backend == "fused" and torch.cuda.is_available():
        from longtake.plugins.adapter import register_plugins

        register_plugins(flavour.module)
    return TrtBackend(bundle, flavour, device or torch.device("cuda"), reason, cuda_graphs, **options)
