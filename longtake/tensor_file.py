"""The one reader of safetensors files: a header that is none, and data that is not all there, are said in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from longtake.dtypes import BY_SAFETENSORS
from longtake.errors import IntegrityError
from longtake.out_of_memory import is_out_of_memory, out_of_memory

# What safetensors, torch and numpy raise for headers and dtypes they cannot do with.
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError)


@contextmanager
def tensors_in(
    path: Path | str,
    says: str = "is not a whole safetensors file",
    fix: str = "restore the file, or make it again",
    framework: Literal["pt", "np"] = "pt",
) -> Iterator[Any]:
    """A safetensors file, open; of its tensors those are read that are asked for. says, fix: for the message.

    Raises:
        IntegrityError: it is truncated, too long, or no safetensors file, or holds what torch has no type for.
        LongtakeError: there is not enough memory for it.
    """
    try:
        with safe_open(str(path), framework=framework) as file:
            _require_known_types(file)
            yield file
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, f"reading {path}") from None
        raise IntegrityError(
            f"{path} {says}",
            got=f"{error!s:.300}" or type(error).__name__,
            expected="a safetensors header, and all data that it names",
            fix=fix,
        ) from None
    except MemoryError as error:
        raise out_of_memory(error, f"reading {path}") from None


def read_tensors(path: Path | str, says: str, fix: str) -> dict[str, Any]:
    """All tensors of a file, by name, on the CPU. Raises what `tensors_in` does."""
    with tensors_in(path, says, fix) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _require_known_types(file: Any) -> None:
    for name in file.keys():  # noqa: SIM118
        kind = file.get_slice(name).get_dtype()
        if kind not in BY_SAFETENSORS:
            raise ValueError(f"tensor {name[:60]!r} is of type {kind}")
