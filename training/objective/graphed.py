"""Losses and passes as CUDA graphs: a small model's step is thousands of launches, not arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

WARM_UP = 3  # runs before a capture, for what a first run alone does

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
    A graph holds what the backward pass needs of its latest run alone, so it runs once a backward pass.
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
            samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in tensors)
            with device_of(tensors):
                captured = torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
            return cast(Callable[..., Losses], captured)
        except RuntimeError as error:
            say_why(error)
            self.enabled = False
            return self.loss


class GraphedPass:
    """Calls `function(*tensors)` without gradient, captured once for every set of shapes it meets; gives new tensors.

    Where capture fails (it says why) the function runs uncaptured. Weights and buffers may change in place between calls.
    """

    def __init__(self, function: Callable[..., Losses], enabled: bool = True) -> None:
        self.function, self.enabled = function, enabled
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Losses]] = {}
        self.pool: Any = None  # one for all: a graph's results are copied before another one runs

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> Losses:
        shapes = tuple(x.shape for x in tensors)
        if self.enabled and shapes not in self.graphs:
            self.capture(shapes, tensors)
        if not self.enabled:
            return self.function(*tensors)
        graph, inputs, outputs = self.graphs[shapes]
        torch._foreach_copy_(inputs, list(tensors))
        graph.replay()
        return tuple(x.clone() for x in outputs)

    def capture(self, shapes: tuple[torch.Size, ...], tensors: tuple[Tensor, ...]) -> None:
        """Record the function for these shapes."""
        try:
            inputs = [x.contiguous().clone() for x in tensors]
            with device_of(tensors):
                own, current = torch.cuda.Stream(), torch.cuda.current_stream()
                own.wait_stream(current)
                with torch.cuda.stream(own):
                    for _ in range(WARM_UP):
                        self.function(*inputs)
                current.wait_stream(own)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    outputs = self.function(*inputs)
            self.pool = self.pool or graph.pool()
            self.graphs[shapes] = graph, inputs, outputs
        except RuntimeError as error:
            say_why(error)
            self.enabled = False


def device_of(tensors: tuple[Tensor, ...]) -> AbstractContextManager[Any]:
    """Their GPU as the current one: what is captured is what its streams are given."""
    return torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext()


def say_why(error: RuntimeError) -> None:
    """That a capture failed, and why."""
    why = (str(error) or type(error).__name__).splitlines()[0]
    logger.warning("going on without CUDA graphs, which is slower: %s", why)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
