"""How a session samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from longtake.errors import LongtakeError
from longtake.record import whole_number
from longtake.runtime.story import checked_prompt
from longtake.training.models.sampler import STEPS_FIX, Schedule, Solver, schedule_from, schedule_of, solver_named

MOST_GUIDANCE = 100
GUIDANCE_FIX = "pass guidance=1 (--guidance 1), or leave guidance out for the model's own"


@dataclass(frozen=True)
class Sampling:
    """How chunks are sampled; what is None is as the story, else the checkpoint, says.

    steps: as many, evenly over 0..1000, then shifted. timesteps: these instead, falling, such as (1000, 750, 500, 250); they
    are taken as they are unless a shift comes with them. shift: t' = s t / (1 + (s - 1) t) of t / 1000. guidance: 1 for none.
    solver: "unipc" or "euler".
    """

    steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    shift: float | None = None
    guidance: float | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        """Raise LongtakeError for an unknown solver, steps and timesteps at once, and timesteps that are no schedule."""
        if self.solver is not None:
            solver_named(self.solver)
        if self.timesteps is None:
            return
        if self.steps is not None:
            what, got = "steps and timesteps say the same in two ways", f"{self.steps} and {self.timesteps}"
            raise LongtakeError(what, got=got, expected="one of the two", fix="leave steps out")
        object.__setattr__(self, "timesteps", tuple(_number(t, "timestep") for t in self.timesteps))
        schedule_from(self.timesteps)


def sampling_of(given: Sampling | None, steps: int | None, guidance: float | None) -> Sampling:
    """`given`, or the two that are a part of it. Raises LongtakeError for both."""
    if given is None:
        return Sampling(steps=steps, guidance=guidance)
    if steps is not None or guidance is not None:
        fix = "pass sampling=Sampling(steps=4, guidance=1)"
        raise LongtakeError("steps and guidance are part of sampling", got="both", expected="one of the two", fix=fix)
    return given


@dataclass(frozen=True)
class SessionOptions:
    """guidance 1 turns classifier-free guidance off. endless: go on when the script ends. retakes: keep every chunk's latents.

    The rest is as in Sampling.
    """

    seed: int = 0
    steps: int = 16
    guidance: float = 1.0
    negative_prompt: str = ""
    shift: float = 5.0
    decode: bool = True
    endless: bool = False
    retakes: bool = False
    solver: str = "unipc"
    timesteps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raise LongtakeError for what cannot be sampled. Seed and steps become ints: the noise is drawn from a seed's text."""
        object.__setattr__(self, "seed", whole_number(self.seed, "seed", "pass seed=7 (--seed 7)"))
        object.__setattr__(self, "steps", whole_number(self.steps, "number of denoise steps", STEPS_FIX))
        if not 0 <= self.seed < 2**63:
            raise LongtakeError("bad seed", got=self.seed, expected="0 to 2^63 - 1", fix="pass seed=7 (--seed 7)")
        if isinstance(self.guidance, bool) or not isinstance(self.guidance, Real):
            got = repr(self.guidance)
            raise LongtakeError("bad guidance scale", got=got, expected="a number", fix=GUIDANCE_FIX)
        object.__setattr__(self, "guidance", float(self.guidance))
        if not (math.isfinite(self.guidance) and abs(self.guidance) <= MOST_GUIDANCE):
            what, expected = "bad guidance scale", f"at most {MOST_GUIDANCE}, 1 for none"
            raise LongtakeError(what, got=self.guidance, expected=expected, fix=GUIDANCE_FIX)
        object.__setattr__(self, "shift", _number(self.shift, "shift"))
        if not 0 < self.shift <= 1000:
            raise LongtakeError("bad shift", got=self.shift, expected="above 0, 1 for none", fix="pass shift=5")
        if self.negative_prompt:
            checked_prompt(self.negative_prompt, "the negative prompt")
        self.new_solver()

    @property
    def guided(self) -> bool:
        """Whether each pass runs twice, with a state and a prompt of its own."""
        return self.guidance != 1.0

    @property
    def negative(self) -> str | None:
        """The prompt that guidance leads away from; None without guidance."""
        return self.negative_prompt if self.guided else None

    @property
    def schedule(self) -> Schedule:
        """Timesteps and sigmas of a chunk."""
        return schedule_from(self.timesteps, self.shift) if self.timesteps else schedule_of(self.steps, self.shift)

    def new_solver(self) -> Solver:
        """The solver of one chunk."""
        return solver_named(self.solver)(self.schedule)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise LongtakeError(f"bad {what}", got=repr(value), expected="a number", fix="pass such as 5")
    return value if isinstance(value, int | float) else float(value)
