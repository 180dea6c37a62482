"""PyTorch itself as a backend: the oracle of checks and tests. Not among the backends a user chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtake.accuracy.compare import recipe_models
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.host import HostBackend
from longtake.runtime.backends.torch_parts import checkpoint_folder
from longtake.training.models.checkpoint import weights_digests
from longtake.training.models.families import family_of
from longtake.training.models.load import Models, load_models


class TorchBackend(HostBackend):
    """Runs the recipe's torch modules in fp32, with weights as the recipe's files store them and its fake-quant."""

    name = "torch"

    def __init__(
        self,
        recipe: Recipe,
        models: Models | None = None,
        checkpoints: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`models` (plain ones; the precision is applied here), or else those in `checkpoints` (the shipped ones)."""
        plain = models if models is not None else load_models(recipe.model, checkpoints)
        super().__init__(
            recipe, "PyTorch in fp32, the oracle", device or torch.device("cpu"), plain.preset, checkpoints
        )
        if models is None:
            self.weights = weights_digests(checkpoint_folder(plain.preset, checkpoints))
        self.vocabulary = tuple(plain.vocabulary)
        oracle, family = recipe_models(plain, recipe.precision), family_of(plain.preset)
        self._modules = {name: family.module(oracle, recipe, name).to(self.device) for name in self.specs}

    @torch.no_grad()
    def call(self, network: str, inputs: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        """See HostBackend.call."""
        spec = self.specs[network]
        outputs = self._modules[network](*(inputs[binding.name].to(self.device) for binding in spec.inputs))
        return {binding.name: tensor for binding, tensor in zip(spec.outputs, outputs, strict=True)}
