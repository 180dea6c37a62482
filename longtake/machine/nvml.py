"""NVML, the driver's own account of GPUs, for as long as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def nvml() -> Iterator[Any]:
    """The initialized `pynvml` module. Raises ImportError without it, and NVML's own errors without a driver."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()  # initializations are counted: each needs its end
