"""What FP8 attention must answer before a run uses it: windows whose output is known in closed form.

Ones give ones, unless a sum stands still. Parts that weigh differently show whether the library's statistics are what
the merge takes them for: natural logarithms of the sums over scaled scores, the scales of q and k within them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from longtake.plugins.kernels import Dims
from longtake.plugins.sink_attention.window import FACTOR_BYTES, FACTORS, parts

ONE, TOP = 0x38, 0x7E  # E4M3's codes of 1 and of its largest number, 448
# E4M3's steps around 1 are 1/16 and 1/8, and Hopper's sums round down: a step off is rounding. Wrong conventions of the
# merge are at least 0.12 off.
STEP_BELOW, STEP_ABOVE = 0.07, 0.13
KEYS = (ONE, 0x3A)  # 1 and 1.25: a part's keys; scores differ by DESCALE_Q * sqrt(D) / 4
VALUES = (0xB8, ONE)  # -1 and 1: a part's values
DESCALE_Q = 0.5  # not 1, so that a merge which misses it shows


@dataclass(frozen=True)
class Trial:
    """What to write to a workspace, and the answer. uneven: parts differ in keys and values, else all is 1.
    top: values stand at the top of E4M3's range, as scaled ones do: more of their bits lie below the sum's last one."""

    name: str
    uneven: bool = False
    top: bool = False

    @property
    def tolerance(self) -> float:
        return STEP_BELOW if self.uneven else STEP_ABOVE

    def fill(self, memory: Tensor, places: dict[str, int], dims: Dims, entries: int) -> float:
        """Write window, queries and factors into uint8 [bytes] at the offsets `places`; returns the expected output."""
        memory.fill_(ONE)
        row = dims["H"] * dims["D"]
        factors = memory[places["factors"] :][: 16 * FACTOR_BYTES].view(torch.float32)
        factors.fill_(1.0)
        if self.top:
            memory[places["window_v"] :][: entries * dims["L"] * row].fill_(TOP)
            factors[FACTORS.index("descale_v") * FACTOR_BYTES // 4] = 1 / 448
        if not self.uneven:
            return 1.0
        factors[FACTORS.index("descale_q") * FACTOR_BYTES // 4] = DESCALE_Q
        weights = [0.0, 0.0]
        for index, (first, keys) in enumerate(parts(dims["L"], entries)):
            odd = index % 2
            for name, codes in (("window_k", KEYS), ("window_v", VALUES)):
                memory[places[name] + first * row :][: keys * row].fill_(codes[odd])
            weights[odd] += keys * exp(odd * DESCALE_Q * dims["D"] ** 0.5 / 4)
        return (weights[1] - weights[0]) / sum(weights)


ONES = (Trial("of ones"),)
SCALED = (*ONES, Trial("of ones that are scaled", top=True))
UNEVEN = Trial("whose parts weigh differently", uneven=True)


def trials(dims: Dims, entries: int) -> tuple[Trial, ...]:
    """The trials of a window of `entries` blocks."""
    return (*SCALED, UNEVEN) if len(parts(dims["L"], entries)) > 1 else SCALED
