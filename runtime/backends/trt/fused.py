"""The fused backend: plugins inside the engine, caches written in place by the engine itself.

Plans for it are built and checked; it was not run: no GPU that TensorRT-RTX 1.7 supports was at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longtake.formats.bundle import Bundle
from longtake.machine.flavour import flavour_here
from longtake.runtime.backends.trt.backend import TrtBackend, check_mode


class FusedBackend(TrtBackend):
    """Backend "fused". An aliased output is bound to the address of the input it is written over."""

    name = "fused"


def open_backend(
    folder: Path,
    device: torch.device | None = None,
    reason: str = "asked for",
    cuda_graphs: bool = True,
    **options: Any,
) -> FusedBackend:
    """Open the engines in `folder`; registers the plugins before anything is deserialised; `options` are
    TrtBackend's.

    Raises:
        UnavailableError: no GPU, another GPU or TensorRT than they were built for, or built segmented.
        IntegrityError: a file is damaged or was swapped.
    """
    bundle = Bundle.read(folder)
    check_mode(bundle, "fused", folder)
    flavour = flavour_here()
    if torch.cuda.is_available():
        from longtake.plugins.adapter import register_plugins

        register_plugins(flavour.module)
    return FusedBackend(bundle, flavour, device or torch.device("cuda"), reason, cuda_graphs, **options)
