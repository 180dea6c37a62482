"""Which blocks of the teacher-forced sequence each rank holds, and in which order the gathered sequence stands.

The sequence has 2N blocks, places 0..N-1 the clean chunks and N..2N-1 the noisy ones. A layout is the order in which
they stand when the ranks' parts are put one after the other:

  balanced  rank r holds clean and noisy half of its own chunks: [c0 n0 | c1 n1 | ...]; every rank has as many clean,
            noisy and loss tokens as any other, and its clean and noisy halves need the same latents and prompts
  naive     [all clean, all noisy], cut into equal parts: some ranks have no token that the loss looks at
  none      the same on one rank, without the last clean chunk: nothing looks at it

Legend: N chunks, P ranks, T tokens of a chunk, S blocks of the gathered sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.models.wan.window import block_mask

MODES = ("balanced", "naive")
NONE = "none"


@dataclass(frozen=True)
class Layout:
    """The places of `chunks` chunks in the order of `mode` on `ranks` ranks."""

    mode: str
    chunks: int
    ranks: int

    def __post_init__(self) -> None:
        """Raise LongtakeError where the blocks can't be dealt out evenly."""
        if self.mode not in MODES and (self.mode, self.ranks) != (NONE, 1):
            raise LongtakeError(
                "unknown --sp-mode", got=self.mode, expected=" or ".join(MODES), fix="--sp-mode balanced"
            )
        dealt = self.chunks if self.mode == "balanced" else 2 * self.chunks
        if dealt < 1 or dealt % self.ranks:
            raise LongtakeError(
                f"{self.chunks} chunks can't be dealt out evenly to {self.ranks} ranks",
                got=f"--chunks {self.chunks}, --sequence-parallel {self.ranks}, --sp-mode {self.mode}",
                expected=f"{'chunks' if self.mode == 'balanced' else 'twice the chunks'} a multiple of {self.ranks}",
                fix=f"--chunks {max(1, round(self.chunks / self.ranks)) * self.ranks}, or fewer ranks",
            )

    @property
    def order(self) -> tuple[int, ...]:
        """The place that stands at each position of the gathered sequence."""
        if self.mode != "balanced":
            return tuple(place for place in range(2 * self.chunks) if self.mode == "naive" or place != self.chunks - 1)
        share = self.chunks // self.ranks
        return tuple(
            half * self.chunks + rank * share + i for rank in range(self.ranks) for half in (0, 1) for i in range(share)
        )

    def local(self, rank: int) -> tuple[int, ...]:
        """The places that `rank` holds: clean ones first, each half in ascending order."""
        share = len(self.order) // self.ranks
        return self.order[rank * share : (rank + 1) * share]

    def clean(self, rank: int) -> list[int]:
        """Chunks whose clean half `rank` holds."""
        return [place for place in self.local(rank) if place < self.chunks]

    def noisy(self, rank: int) -> list[int]:
        """Chunks whose noisy half `rank` holds."""
        return [place - self.chunks for place in self.local(rank) if place >= self.chunks]

    def mask(self, history: Tensor) -> Tensor:
        """`window.block_mask` of a history [..., N, N], rows and columns in this order: bool [..., S, S]."""
        order = torch.tensor(self.order, device=history.device)
        return block_mask(history)[..., order, :][..., order]

    def seen(self, history: Tensor, complete: bool = False) -> tuple[tuple[int, ...], ...]:
        """Positions of the gathered sequence that the block at each position attends to, of one history [N, N].

        Nothing that the loss depends on looks at the output of the last clean chunk: its list is empty, unless
        `complete`. What quantizers measure must be complete, or they see activations that no model ever has.
        """
        rows = self.mask(history.cpu()).tolist()
        unused = -1 if complete else self.chunks - 1
        return tuple(
            () if self.order[position] == unused else tuple(key for key, sees in enumerate(row) if sees)
            for position, row in enumerate(rows)
        )
