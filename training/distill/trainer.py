"""The training loop of distillation: the trainer's, with an optimizer for each of two networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longtake.training.distill.base import DMDStage
from longtake.training.distill.lora import Adapter
from longtake.training.optimizer import Averaged, OptimizerConfig
from longtake.training.stages.base import Metric
from longtake.training.trainer import SAVED, TrainConfig, Trainer, backward

CRITIC = "critic/"


class TwoOptimizers:
    """The generator's AdamW and EMA, and the critic's AdamW; to resume points they are one."""

    def __init__(self, generator: Averaged, critic: Averaged) -> None:
        self.generator, self.critic = generator, critic

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [*self.generator.params, *self.critic.params]

    def state(self) -> dict[str, Tensor]:
        """Both, by name."""
        critic = {f"{CRITIC}{name}": tensor for name, tensor in self.critic.state().items()}
        return {**self.generator.state(), **critic}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        critic = {name.removeprefix(CRITIC): x for name, x in tensors.items() if name.startswith(CRITIC)}
        self.generator.load_state({name: x for name, x in tensors.items() if not name.startswith(CRITIC)})
        self.critic.load_state(critic)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the generator carries its EMA weights."""
        with self.generator.averaged_weights():
            yield


class DistillTrainer(Trainer):
    """Every step trains the critic, every `critic_updates`-th the generator first, on the same batch."""

    def __init__(self, stage: DMDStage, config: TrainConfig, critic: OptimizerConfig, device: torch.device) -> None:
        super().__init__(stage, config, device)
        self.distill, self.critic_config = stage, critic
        zero: dict[str, Metric] = {"dmd": 0.0, "dmd_gradient": 0.0, "generator_norm": 0.0}
        self.latest = zero  # of the last generator update, shown until the next

    def new_optimizer(self) -> Any:
        """See TwoOptimizers."""
        generator = Averaged(self.distill.modules, self.config.optimizer)
        return TwoOptimizers(generator, Averaged(self.distill.critic_modules, self.critic_config))

    def train_step(self) -> None:
        """The generator's update when it is due, then the critic's."""
        step, both, stage = self.step - 1, self.optimizer, self.distill
        stage.on_step(step)
        scene = stage.scene(self.generator)
        if step % stage.options.critic_updates == 0:
            found = backward(stage.generator_losses(scene))
            norm = both.generator.step(step, self.config.steps)  # type: ignore[attr-defined]
            self.latest = {"dmd": found["loss"], "dmd_gradient": found["dmd_gradient"], "generator_norm": norm}
        found = backward(stage.critic_losses(scene))
        norm = both.critic.step(step, self.config.steps)  # type: ignore[attr-defined]
        self.pending.append({**found, **self.latest, "grad_norm": norm})
        self.batches.append(None)

    def save_module(self, name: str, facts: dict[str, Any]) -> None:
        """The student as a plain DiT, adapters merged; beside it, the adapter alone."""
        dtype, state = SAVED[self.config.save_dtype], self.distill.networks.student().state_dict()
        self.save(name, {k: v.to(dtype) for k, v in state.items()}, facts)
        adapter = self.distill.modules[name]
        if isinstance(adapter, Adapter):
            self.save(f"{name}_lora", adapter.tensors(), facts)
