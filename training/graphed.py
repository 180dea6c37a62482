"""The loss of a training step as one CUDA graph: a small model's step is thousands of launches, not arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Losses = tuple[Tensor, ...]  # the loss, then what else is wanted, without gradient


class LossModule(nn.Module):
    """A loss of tensors only, with its parameters in sight: what `torch.cuda.make_graphed_callables` captures."""

    def __init__(self, modules: dict[str, nn.Module], loss: Callable[..., Losses]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.loss = loss

    def forward(self, *tensors: Tensor) -> Losses:
        weighted, *others = self.loss(*tensors)
        return (weighted, *(other.detach() for other in others))


class GraphedLoss:
    """Calls `loss(*tensors)`, forward and backward captured once for every set of shapes it meets.

    Where capture fails (it says why) the loss runs uncaptured. Weights and buffers may change in place between calls.
    """

    def __init__(self, modules: dict[str, nn.Module], loss: Callable[..., Losses], enabled: bool) -> None:
        self.modules, self.loss, self.enabled = modules, loss, enabled
        self.graphs: dict[tuple[torch.Size, ...], Callable[..., Losses]] = {}

    def __call__(self, *tensors: Tensor) -> Losses:
        if not self.enabled:
            return self.loss(*tensors)
        shapes = tuple(x.shape for x in tensors)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(tensors)
        return self.graphs[shapes](*tensors)

    def capture(self, tensors: tuple[Tensor, ...]) -> Callable[..., Losses]:
        """The captured loss for these shapes, or the plain one."""
        module = LossModule(self.modules, self.loss)
        try:
            samples = tuple(x.clone() for x in tensors)
            captured = torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
            return cast(Callable[..., Losses], captured)
        except RuntimeError as error:
            logger.warning("training without CUDA graphs, which is slower: %s", str(error).splitlines()[0])
            torch.cuda.synchronize()
            self.enabled = False
            return self.loss
