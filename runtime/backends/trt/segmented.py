"""The segmented backend: graphs cut at the custom ops, for TensorRT flavours that cannot load plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longtake.formats.bundle import Bundle
from longtake.machine.flavour import flavour_here
from longtake.runtime.backends.trt.backend import TrtBackend, check_mode


class SegmentedBackend(TrtBackend):
    """Backend "segmented"."""

    name = "segmented"


def open_backend(
    folder: Path,
    device: torch.device | None = None,
    reason: str = "asked for",
    cuda_graphs: bool = True,
    **options: Any,
) -> SegmentedBackend:
    """Open the engines in `folder` (see longtake/formats/bundle.py); `options` are TrtBackend's.

    Raises:
        UnavailableError: no GPU, another GPU or TensorRT than they were built for, or built fused.
        IntegrityError: a file is damaged or was swapped.
    """
    bundle = Bundle.read(folder)
    check_mode(bundle, "segmented", folder)
    return SegmentedBackend(bundle, flavour_here(), device or torch.device("cuda"), reason, cuda_graphs, **options)
