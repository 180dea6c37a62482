"""The three networks of distillation: generator, fake score and real score, all from one teacher-forced checkpoint.

Without LoRA they are three DiTs. With LoRA they are one frozen base: the real score is the base itself, generator and
fake score an adapter each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from longtake.training.distill.lora import Adapter, add_adapters, merged, use_adapter
from longtake.training.distill.options import DistillOptions
from longtake.training.models.quantize import insert_quantizers, plain_state, recalibrate
from longtake.training.models.wan.dit import CausalDiT

GENERATOR, FAKE = "generator", "fake_score"
Calibrate = Callable[[nn.Module], object]


class Networks:
    """`generator()`, `fake()` and `real()` give the DiT to call next; they stay that until the next of these calls."""

    def __init__(
        self, teacher: CausalDiT, options: DistillOptions, device: torch.device, student: CausalDiT | None = None
    ) -> None:
        """`student`: what the generator begins as; a copy of the teacher if None."""
        self.options = options
        teacher.to(device).requires_grad_(False).eval()
        teacher.checkpointing = options.gradient_checkpointing
        self.lora = options.lora_rank > 0
        self._real = teacher
        first = teacher if student is None else student.to(device).eval()
        self._generator = teacher if self.lora else copy.deepcopy(first).requires_grad_(True)
        self._fake = teacher if self.lora else copy.deepcopy(teacher).requires_grad_(True)

    def prepare(self, calibrate: Calibrate) -> None:
        """Quantizers, then adapters: the base is 4 bits and they are not, until they are merged."""
        if self.options.precision == "nvfp4":
            insert_quantizers(self._generator, calibrate, rules=self.options.rules)
        if self.lora:
            rank = self.options.lora_rank
            alpha = self.options.lora_alpha or float(rank)
            add_adapters(self._real, (GENERATOR, FAKE), rank, alpha, self.options.seed)

    def trained(self) -> tuple[nn.Module, nn.Module]:
        """What the optimizers of the generator and of the fake score hold."""
        if self.lora:
            return Adapter(self._real, GENERATOR), Adapter(self._real, FAKE)
        return self._generator, self._fake

    def generator(self) -> CausalDiT:
        return self._select(self._generator, GENERATOR)

    def fake(self) -> CausalDiT:
        return self._select(self._fake, FAKE)

    def real(self) -> CausalDiT:
        return self._select(self._real, None)

    def _select(self, dit: CausalDiT, adapter: str | None) -> CausalDiT:
        if self.lora:
            use_adapter(dit, adapter)
        return dit

    def recalibrate(self, calibrate: Calibrate) -> None:
        """Measure the generator's amax again; a LoRA's base doesn't change, so there is nothing to do."""
        if self.options.precision == "nvfp4" and not self.lora:
            recalibrate(self._generator, calibrate)

    def student(self) -> CausalDiT:
        """A plain copy of the generator with its present weights, adapters merged, without quantizers."""
        if self.lora:
            return merged(self._real, GENERATOR)
        plain = type(self._real)(self._generator.config)
        plain.load_state_dict(plain_state(self._generator))
        return plain.to(next(self._generator.parameters()).device)
