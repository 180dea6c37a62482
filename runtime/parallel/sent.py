"""Which tensors the other ranks have: a prompt's context, 188 MB of the 5B model, must not be sent for every pass."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FEW = 64  # numbers that go with the command


class Sent:
    """Numbers of tensors that the others hold, for as long as nobody here drops or changes them."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # by id: tensor, version, number
        self._dropped: list[int] = []  # written by the collector at any time: told with the next command

    def number(self, tensor: Tensor) -> int | None:
        """Its number; None if the others don't have it as it is now."""
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor or torch.is_inference(tensor):
            return None
        return known[2] if known[1] == tensor._version else None

    def add(self, tensor: Tensor) -> int | None:
        """Its number from now on; None for one whose changes would not show."""
        if torch.is_inference(tensor):
            return None
        number, key = next(self._numbers), id(tensor)
        if key in self._known:
            self._dropped.append(self._known[key][2])

        def drop(gone: weakref.ref[Tensor]) -> None:
            if (known := self._known.get(key)) and known[0] is gone:
                del self._known[key]
                self._dropped.append(number)

        self._known[key] = (weakref.ref(tensor, drop), tensor._version, number)
        return number

    def dropped(self) -> list[int]:
        """Numbers that the others may forget, once."""
        return [self._dropped.pop() for _ in range(len(self._dropped))]

    def described(self, inputs: Mapping[str, Tensor], fresh: str) -> tuple[dict[str, Any], list[Tensor]]:
        """How the others get `inputs`, as JSON by name, and what has to be sent, in order. fresh: one that is not kept."""
        told: dict[str, Any] = {}
        out: list[Tensor] = []
        for name, tensor in inputs.items():
            about = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            if tensor.device.type == "cpu" and tensor.numel() <= FEW and not tensor.is_floating_point():
                told[name] = {**about, "values": tensor.flatten().tolist()}
            elif (number := self.number(tensor)) is not None:
                told[name] = {"kept": number}
            else:
                told[name] = {**about, "keep": None if name == fresh else self.add(tensor)}
                out.append(tensor)
        return told, out
