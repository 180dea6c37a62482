"""A later step of the VAE decoder as one of several ranks exports it: its rows of every frame, with ghost rows around them.

Up to the first upsampling, where the work is small and attention sees the whole frame, every rank computes all of it. From
there on it has its share of the rows and a ghost row on either side, which upsampling doubles. All layers run over the ghost
rows as over others, so that no tensor is cut or joined; what a 3x3 convolution leaves wrong in them is exchanged before the
next one reads it. The ops are those of one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from longtake.plugins.exchange import FIRST_GHOST, halo, take_rows
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.vae_layers import Level
from longtake.training.models.wan.vae_library import LibrarySteady, Walk


class RowsSteady(LibrarySteady):
    """`LibrarySteady` of one of `ranks`: the latent is whole, frames and caches are as `wan.spec.vae_spec` says."""

    def __init__(self, vae: CausalVAE, ranks: int) -> None:
        super().__init__(vae)
        self.ranks = ranks

    def walk(self, caches: Sequence[Tensor], coded: Mapping[int, Any]) -> Walk:
        """See LibrarySteady.walk."""
        return _RowsWalk(caches, self.ranks)


class _RowsWalk(Walk):
    """ghost: ghost rows on either side, 0 while the frames are whole."""

    def __init__(self, caches: Sequence[Tensor], ranks: int) -> None:
        super().__init__(caches, in_place=False, coded={})
        self.ranks, self.ghost = ranks, 0

    def rows(self, x: Tensor) -> Tensor:
        """See Walk.rows."""
        return halo(x, self.ghost) if self.ghost else x

    def level(self, x: Tensor, level: nn.Module) -> Tensor:
        """See Walk.level."""
        assert isinstance(level, Level)
        out = super().level(x, level)
        if level.resample is None:
            return out
        if self.ghost:
            self.ghost *= 2
            return out
        self.ghost = FIRST_GHOST
        return take_rows(out, self.ranks)
