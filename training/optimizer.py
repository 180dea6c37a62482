"""AdamW, its learning-rate schedule, and the exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.options import option


@dataclass(frozen=True)
class AdamWOptions:
    """Optimizer

    AdamW with linear warm-up and cosine decay to `final_lr` x lr. Defaults learn fast from scratch; the 5B reference
    fine-tunes with lr 1e-5, betas (0, 0.999), EMA 0.99.
    """

    betas: tuple[float, float] = option((0.9, 0.99), metavar=("B1", "B2"))
    """decay of AdamW's moments"""
    weight_decay: float = option(0.0, metavar="W")
    """of AdamW"""
    clip: float = option(10.0, metavar="NORM")
    """largest gradient norm"""
    warmup: int = option(200, metavar="N")
    """steps of linear warm-up, then cosine decay"""
    final_lr: float = option(0.05, metavar="F")
    """decay to F x lr; 1 keeps it constant"""


@dataclass(frozen=True)
class OptimizerConfig(AdamWOptions):
    """Optimizer"""

    lr: float = option(1e-3, metavar="RATE")
    """learning rate after the warm-up"""
    ema: float = option(0.999, metavar="DECAY")
    """decay of the averaged weights"""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and all(0 <= beta < 1 for beta in self.betas) and 0 <= self.ema < 1 and self.clip > 0):
            raise LongtakeError(
                "bad optimizer settings", got=self, expected="lr and clip > 0, betas and EMA decay in [0, 1)"
            )

    def warmup_of(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`: a tenth of them at most."""
        return min(self.warmup, steps // 10)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of 0-based `step` in a run of `steps`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_of(steps)))
        progress = min(1.0, step / max(1, steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * warm * (self.final_lr + (1 - self.final_lr) * cosine)


class Averaged:
    """AdamW over the parameters of several modules, with an fp32 EMA of each parameter."""

    def __init__(self, modules: dict[str, nn.Module], config: OptimizerConfig) -> None:
        self.modules, self.config = modules, config
        self.names, self.params = [], []
        for owner, module in modules.items():
            for name, param in module.named_parameters():
                if param.requires_grad:
                    self.names.append(f"{owner}/{name}")
                    self.params.append(param)
        self.adamw = torch.optim.AdamW(
            self.params, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.ema = [param.detach().float().clone() for param in self.params]

    def step(self, step: int, steps: int) -> Tensor:
        """Clip, update and average after a backward pass. Returns the gradient norm, on the device."""
        norm = self.clip()
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr_at(step, steps)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        decay = min(
            self.config.ema, (step + 1) / (step + 10)
        )  # short memory at first: the average isn't to be of noise
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.own(), 1 - decay)
        return norm

    def clip(self) -> Tensor:
        """Clip the gradient; its norm before that."""
        return nn.utils.clip_grad_norm_(self.params, self.config.clip)

    def own(self) -> list[Tensor]:
        """The parameters' values that this process holds, which `ema` averages."""
        return [param.detach() for param in self.params]

    def averages(self) -> Iterable[Tensor]:
        """The EMA of each parameter, shaped like it; it shares `ema`'s memory."""
        return self.ema

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Everything needed to go on bit-identically."""
        for name, param, ema in zip(self.names, self.params, self.averages()):
            yield f"ema/{name}", ema
            for key, value in self.adamw.state[param].items():
                yield f"adamw/{key}/{name}", value
        for owner, module in self.modules.items():
            for name, value in module.state_dict().items():
                yield f"module/{owner}/{name}", value

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, by name."""
        return dict(self.named())

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for name, param in zip(self.names, self.params):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (saved := tensors.get(f"adamw/{key}/{name}")) is not None:
                    like = (
                        torch.empty_like(param, dtype=saved.dtype)
                        if saved.dim()
                        else torch.empty((), device=param.device)
                    )
                    self.adamw.state[param][key] = like  # in the parameter's memory order
        for name, value in self.named():
            if name in tensors or not name.startswith("adamw/"):
                self.copy(value, tensors[name])

    def copy(self, value: Tensor, saved: Tensor) -> None:
        """Restore a tensor in place."""
        value.copy_(saved)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the modules carry the EMA weights; afterwards all their tensors are as before."""
        before = [{k: v.detach().clone() for k, v in m.state_dict().items()} for m in self.modules.values()]
        with torch.no_grad():
            torch._foreach_copy_(self.own(), self.ema)
        try:
            yield
        finally:
            for module, tensors in zip(self.modules.values(), before):
                for name, value in module.state_dict().items():
                    value.copy_(tensors[name])
