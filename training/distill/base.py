"""What a distillation by distribution matching is: a stage with a critic beside what it saves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.distill.networks import Networks
from longtake.training.distill.options import DistillOptions
from longtake.training.stages.base import Metric, Stage


class DMDStage(Stage):
    """Generator and critic losses; `modules` is the generator's part, `critic_modules` the fake score's."""

    name = "distill"
    options: DistillOptions
    networks: Networks
    critic_modules: dict[str, nn.Module]

    @abstractmethod
    def scene(self, generator: torch.Generator) -> Any:
        """A random batch to distil on, which both losses take."""

    @abstractmethod
    def generator_losses(self, scene: Any) -> Iterator[tuple[Tensor, dict[str, Metric]]]:
        """DMD's loss on the student's own videos of a scene, in parts that add up to it."""

    @abstractmethod
    def critic_losses(self, scene: Any) -> Iterator[tuple[Tensor, dict[str, Metric]]]:
        """The critic's loss on the student's videos of a scene, in parts that add up to it."""
