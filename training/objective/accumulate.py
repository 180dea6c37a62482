"""Gradient accumulation: a batch in parts, whose losses add up to the batch's loss and whose gradients to its gradient.

A stage draws the whole batch, noise included, and then computes it part by part; so nothing but the order of sums
depends on the number of parts.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.training.objective.teacher_forcing import Clips, Noise

Batch = TypeVar("Batch", Clips, Noise)
Share = float | Tensor


def parts_of(clips: Clips, noise: Noise, parts: int) -> Iterator[tuple[Clips, Noise, Share]]:
    """`parts` equal parts of a batch, and each one's share in a mean over the frames that count.

    Raises:
        LongtakeError: the batch can't be cut into so many equal parts.
    """
    size, rest = divmod(len(clips.latents), parts)
    if rest or not size:
        what, got = "a batch can't be cut into equal parts", f"{len(clips.latents)} samples, {parts} parts"
        raise LongtakeError(what, got=got, expected="a multiple", fix="choose another --accumulate")
    counted = clips.counted
    total = None if counted is None or parts == 1 else counted.sum().clamp(min=1)
    for start in range(0, len(clips.latents), size):
        rows = slice(start, start + size)
        share: Share = 1 / parts
        if counted is not None and total is not None:
            share = counted[rows].sum() / total
        yield rows_of(clips, rows), rows_of(noise, rows), share


def rows_of(batch: Batch, rows: slice | Tensor) -> Batch:
    """Some samples of a batch; a history that all samples share stays as it is."""
    changed: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        shared = field.name == "history" and isinstance(value, Tensor) and value.dim() == 2
        if isinstance(value, Tensor) and not shared:
            changed[field.name] = value[rows]
    return replace(batch, **changed)


def own_gradients(modules: Mapping[str, nn.Module]) -> None:
    """Give every parameter that learns a gradient of zeros to add to.

    A CUDA graph hands out its own buffers as gradients. A parameter without one would take such a buffer as it is, and
    the next part's run would write over it.
    """
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
