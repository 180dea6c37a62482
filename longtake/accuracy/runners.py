"""The ways in which a network runs on named feeds: the recipe's torch model and its exported view; `longtake check` has
one more for backends. Feeds and outputs are fp32 where the files hold floats, feeds in the order of the spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from torch import Tensor, nn

from longtake.accuracy.ort_session import session_from_model, session_from_view
from longtake.formats.recipe import Recipe
from longtake.training.models.families import family_of
from longtake.training.models.load import Models

Feeds = dict[str, Tensor]


class Runner(Protocol):
    """Runs one network: feeds by name to outputs by name, those of the spec and perhaps more."""

    name: str

    def __call__(self, feeds: Feeds) -> Feeds: ...


class TorchRunner:
    """The torch module of a network; `layers` maps a module's name to the output name it gets."""

    name = "PyTorch"

    def __init__(self, models: Models, network: str, recipe: Recipe, layers: Mapping[str, str] | None = None) -> None:
        family = family_of(models.preset)
        self.module = family.module(models, recipe, network)
        self.outputs = [binding.name for binding in family.spec(models.preset, recipe, network).outputs]
        modules = {output: submodule(self.module, key) for key, output in (layers or {}).items()}
        self.layers = {output: module for output, module in modules.items() if module is not None}

    @torch.no_grad()
    def __call__(self, feeds: Feeds) -> Feeds:
        seen: dict[str, list[Tensor]] = {}
        hooks = [module.register_forward_hook(_keep(seen, name)) for name, module in self.layers.items()]
        try:
            outputs = dict(zip(self.outputs, self.module(*feeds.values())))
        finally:
            for hook in hooks:
                hook.remove()
        return outputs | {name: values[0] for name, values in seen.items() if len(values) == 1}


def submodule(step: nn.Module, name: str) -> nn.Module | None:
    """`name` is relative to the model inside a step module (its only child)."""
    for child in step.children():
        try:
            return child.get_submodule(name)
        except AttributeError:
            continue
    return None


def _keep(seen: dict[str, list[Tensor]], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.setdefault(name, []).append(output.detach())

    return hook


class ViewRunner:
    """ONNX Runtime on the CPU over a view: a file, or a model in memory."""

    name = "ONNX Runtime"

    def __init__(self, view: Path | onnx.ModelProto) -> None:
        self.session = session_from_view(view, few_passes=True) if isinstance(view, Path) else session_from_model(view)

    def __call__(self, feeds: Feeds) -> Feeds:
        arrays = {value.name: feeds[value.name].numpy() for value in self.session.get_inputs()}
        names = [value.name for value in self.session.get_outputs()]
        return {name: torch.from_numpy(array) for name, array in zip(names, self.session.run(names, arrays))}
