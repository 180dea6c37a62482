"""A tensor that is yet to be made: its shape is known and checked long before its content is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import IntegrityError
from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.presets import Preset
from longtake.training.models.side_file import SideFile


@dataclass(frozen=True)
class Pending:
    """Shape, dtype, and what makes the tensor; `make` may be called more than once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Pending:
        """The same tensor in another dtype, rounded to nearest."""
        return Pending(self.shape, dtype, lambda: self.make().to(dtype))


@dataclass(frozen=True)
class Converted:
    """A model's tensors under our names, each of them checked to be of the shape it must have, and what is told of them.

    kind: "dit", "vae" or "text_encoder". meta: goes into the side file.
    """

    kind: str
    preset: Preset
    tensors: Mapping[str, Pending]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the file it becomes, but for the header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, path: Path, progress: Callable[[int], object] = lambda done: None) -> None:
        """Write the checkpoint pair, one tensor in memory at a time; `progress` is called with the bytes of each.

        Raises:
            IntegrityError: a tensor is not finite; nothing stands under `path` that wasn't there before.
        """
        told = {"preset": self.preset.name, "preset_digests": self.preset.digests, **self.meta}
        side = SideFile.of({"kind": self.kind, **told})
        save_checkpoint(path, self.tensors, side, lambda name: made(name, self.tensors[name]), progress)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it in memory: for small models."""
        return {name: made(name, tensor) for name, tensor in self.tensors.items()}


def pending(tensor: Tensor) -> Pending:
    """`tensor` itself, which may be a view of a mapped file."""
    return Pending(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def made(name: str, tensor: Pending) -> Tensor:
    """The content of `tensor`, checked to be finite.

    Raises:
        IntegrityError: it holds NaN or infinity, as given or once rounded to a narrower dtype.
    """
    content = tensor.make().detach()
    extremes = content.aminmax() if content.numel() else ()  # both NaN if one element is; needs no memory
    if not all(torch.isfinite(extreme) for extreme in extremes):
        fix = "get the file again; training may have diverged"
        raise IntegrityError(f"weight {name} is not finite", got="NaN or infinity", expected="finite numbers", fix=fix)
    return content
