"""How a linear's weight becomes NVFP4, and the record of it that travels with a checkpoint.

dit.json may hold `"nvfp4": {"weight": {"rule", "order", "block_2d"}}`, what all its linears were trained with, and
`"packed": {"rule", "order", "amax": {linear: amax}}`, what linears had been packed with that a file brought in 4 bits.
Without either, weights are packed by static_6 in ModelOpt's order, in blocks along a row.

Scales of 16 x 16 tiles are stored like any: each of a tile's 16 rows repeats the tile's scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.plugins.nvfp4.reference import BLOCK, ORDERS, RULE_LIMITS, Packed, fake_quantize, quantize

CHUNK = 1 << 20  # elements at a time: the codec's intermediates take some 40 bytes each


@dataclass(frozen=True)
class WeightFormat:
    """Rule, arithmetic order and scale layout of a weight (see `reference`).

    block_2d: a scale for a 16 x 16 tile, so that W and its transpose quantize alike. amax: what the weight was packed
    with, when it is known; it overrides what is measured or calibrated.
    """

    rule: str = "static_6"
    order: str = "modelopt"
    block_2d: bool = False
    amax: float | None = None

    def __post_init__(self) -> None:
        for what, got, known in (("rule", self.rule, tuple(RULE_LIMITS)), ("order", self.order, ORDERS)):
            if got not in known:
                raise LongtakeError(f"unknown NVFP4 weight {what}", got=got, expected=", ".join(known))

    def amax_of(self, weight: Tensor, calibrated: float | None = None) -> float:
        """The amax to quantize `weight` with: that it was packed with, else the calibrated one, else max |W|."""
        found = self.amax if self.amax is not None else calibrated
        return float(weight.detach().abs().amax()) if found is None else found

    def pack(self, weight: Tensor, amax: float) -> Packed:
        """Codes and scales of weight [N, K] (any float dtype), on the CPU."""
        pieces = [quantize(rows.float(), amax=amax, **self.as_json()) for rows in self._pieces(weight.detach().cpu())]
        values, scales = (torch.cat([getattr(p, part) for p in pieces]) for part in ("values", "scales"))
        return Packed(values, scales, pieces[0].amax, self.rule)

    @torch.no_grad()
    def round_trip_(self, weight: Tensor, amax: float) -> None:
        """Replace weight [N, K] by what its NVFP4 form decodes to, in place."""
        for rows in self._pieces(weight.detach()):
            rows.copy_(fake_quantize(rows, amax=amax, **self.as_json()))

    def as_json(self) -> dict[str, Any]:
        """What a side file holds, and the codec takes."""
        return {"rule": self.rule, "order": self.order, "block_2d": self.block_2d}

    def _pieces(self, weight: Tensor) -> Iterator[Tensor]:
        yield from weight.split(max(1, CHUNK // weight.shape[1] // BLOCK) * BLOCK)  # never through a tile


STATIC_6 = WeightFormat()


@dataclass(frozen=True)
class WeightFormats:
    """The format of every linear: `own` by name, `default` for the rest."""

    default: WeightFormat = STATIC_6
    own: Mapping[str, WeightFormat] = field(default_factory=dict)

    def of(self, name: str) -> WeightFormat:
        return self.own.get(name, self.default)


UNRECORDED = WeightFormats()  # of a checkpoint that says nothing


def formats_from_meta(meta: Mapping[str, Any]) -> WeightFormats:
    """The formats that a DiT's side file records.

    Raises:
        IntegrityError: a record is not one.
        LongtakeError: a rule or order is unknown.
    """
    trained, packed = meta.get("nvfp4") or {}, meta.get("packed") or {}
    try:
        default = WeightFormat(**trained.get("weight", {}))
        how = {"rule": packed.get("rule", "mse"), "order": packed.get("order", "longlive")}
        own = {name: WeightFormat(**how, amax=float(amax)) for name, amax in packed.get("amax", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        what, got = "the side file's record of 4-bit weights can't be read", f"{type(error).__name__}: {error}"
        expected = '"nvfp4": {"weight": {rule, order, block_2d}} or "packed": {rule, order, amax: {linear: number}}'
        raise IntegrityError(what, got=got, expected=expected, fix="train or convert the checkpoint again") from None
    return WeightFormats(default, own)
