"""How a session samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longtake.config import whole_number
from longtake.errors import LongtakeError
from longtake.runtime.story import checked_prompt

MOST_GUIDANCE = 100


@dataclass(frozen=True)
class SessionOptions:
    """guidance 1 turns classifier-free guidance off. endless: go on when the script ends."""

    seed: int = 0
    steps: int = 16
    guidance: float = 1.0
    negative_prompt: str = ""
    shift: float = 5.0
    decode: bool = True
    endless: bool = False

    def __post_init__(self) -> None:
        """Raise LongtakeError for what cannot be sampled. Seed and steps become ints: the noise is drawn from a seed's text."""
        object.__setattr__(self, "seed", whole_number(self.seed, "seed", "pass --seed 7"))
        object.__setattr__(self, "steps", whole_number(self.steps, "number of denoise steps", "pass --steps 16"))
        if not 0 <= self.seed < 2**63:
            raise LongtakeError("bad seed", got=self.seed, expected="0 to 2^63 - 1", fix="pass --seed 7")
        if not (math.isfinite(self.guidance) and abs(self.guidance) <= MOST_GUIDANCE):
            raise LongtakeError("bad guidance scale", got=self.guidance, expected=f"at most {MOST_GUIDANCE}, 1 for none",
                                fix="pass --guidance 3")  # fmt: skip
        if self.negative_prompt:
            checked_prompt(self.negative_prompt, "the negative prompt")

    @property
    def guided(self) -> bool:
        """Whether each pass runs twice, with a state and a prompt of its own."""
        return self.guidance != 1.0
