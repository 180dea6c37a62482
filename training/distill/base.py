"""What a distillation by distribution matching is: a stage with a critic beside what it saves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.distill.networks import Networks
from longtake.training.distill.options import DistillOptions
from longtake.training.models.quantize import insert_quantizers, read_amax
from longtake.training.stages.base import Loss, Stage


class DMDStage(Stage):
    """Generator and critic losses; `modules` is the generator's part, `critic_modules` the fake score's.

    A loss of a scene comes in parts that add up to it: a part's backward pass comes before the next part is asked for.
    """

    name = "distill"
    options: DistillOptions
    device: torch.device
    networks: Networks
    train: Any

    def start(self) -> None:
        """Make what is trained of the networks, quantized where the student is."""
        self.networks.prepare(self.calibration(0))
        generator, fake = self.networks.trained()
        self.modules: dict[str, nn.Module] = {"dit": generator}
        self.critic_modules: dict[str, nn.Module] = {"fake_score": fake}

    def autocast(self) -> AbstractContextManager[None]:
        # No cache: a weight cast under no_grad must not serve a pass that wants a gradient.
        enabled = self.options.computes_in_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    @abstractmethod
    def scene(self, generator: torch.Generator) -> Any:
        """A random batch to distil on, which both losses take."""

    @abstractmethod
    def generator_losses(self, scene: Any) -> Iterator[Loss]:
        """DMD's loss on the student's own videos of a scene."""

    @abstractmethod
    def critic_losses(self, scene: Any) -> Iterator[Loss]:
        """The critic's loss on the student's videos of a scene."""

    def losses(self, step: int, generator: torch.Generator) -> Iterator[Loss]:
        """The critic's; the trainer of this stage takes both losses apart."""
        return self.critic_losses(self.scene(generator))

    @abstractmethod
    def roll_out(self, dit: Any, index: Tensor, generator: torch.Generator) -> None:
        """All of a student's steps on training samples `index`, with noise of `generator`."""

    def calibration(self, step: int) -> Callable[[nn.Module], None]:
        """A rollout that depends on the seed and `step` only, for ModelOpt to measure amax on."""

        def run(dit: nn.Module) -> None:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
            index = torch.randint(len(self.train), (min(self.options.batch, 8),), generator=generator)
            self.roll_out(dit, index, generator)

        return run

    def on_step(self, step: int) -> None:
        """Calibrate again every `recalibrate` steps, under NVFP4."""
        if step % self.options.recalibrate == 0:
            self.networks.recalibrate(self.calibration(step))

    def amax(self) -> dict[str, dict[str, float]]:
        """Of the student's linears, for the present weights."""
        return read_amax(insert_quantizers(self.networks.student(), self.calibration(0), rules=self.options.rules))
