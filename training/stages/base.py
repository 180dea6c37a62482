"""What a training stage is: the trainer runs any of them, the command line builds them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Metric = float | Tensor
Loss = tuple[Tensor, dict[str, Metric]]


class Stage(ABC):
    """A training stage. `modules` are trained, averaged (EMA) and saved, each under its name.

    companions: frozen checkpoints copied beside its own at the end, so that --out is complete. line: what its data is.
    """

    name: str
    modules: dict[str, nn.Module]
    companions: Sequence[Path] = ()
    line: str = ""

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Move to `device`, build data sets and caches. Called once, before anything else."""

    @abstractmethod
    def losses(self, step: int, generator: torch.Generator) -> Iterable[Loss]:
        """Loss and metrics of one step, in parts to be added up: a part's backward pass comes before the next part is
        asked for. Tensors stay on the device until they are logged.

        All randomness comes from `generator` (CPU), or from device generators seeded from it.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics with the modules' present weights."""

    def samples(self) -> Tensor | None:
        """Something to look at: uint8 [N, T, 3, H, W], or None."""
        return None

    @abstractmethod
    def metadata(self) -> dict[str, dict[str, Any]]:
        """What to save beside each module: module name -> JSON-ready facts (amax, vocabulary, settings)."""

    def leave(self, out: Path) -> None:  # noqa: B027
        """Write what else belongs to its checkpoints into `out`."""

    def on_step(self, step: int) -> None:  # noqa: B027
        """Called before the loss of `step` (0-based), for instance to calibrate quantizers again."""

    def batch_name(self) -> object:
        """What the latest batch is called if it diverges."""
        return None

    def state(self) -> dict[str, Tensor]:
        """What resume points hold of it besides its modules."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore what `state` gave."""

    def position(self) -> dict[str, Any]:
        """Its place in the data, JSON-ready, for resume points."""
        return {}

    def require_position(self, position: dict[str, Any]) -> None:  # noqa: B027
        """Raise LongtakeError if a resume point with this position does not fit the stage. Called before it is loaded."""

    def seek(self, position: dict[str, Any]) -> None:  # noqa: B027
        """Go on from there."""
