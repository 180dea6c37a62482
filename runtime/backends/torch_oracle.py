"""PyTorch itself as a backend: the oracle of checks and tests. Not among the backends a user chooses from."""

from __future__ import annotations

from pathlib import Path

import torch

from longtake.accuracy.compare import recipe_models
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.torch_modules import TorchModules
from longtake.runtime.backends.torch_parts import checkpoint_folder
from longtake.training.models.checkpoint import weights_digests
from longtake.training.models.families import family_of
from longtake.training.models.load import Models, load_models


class TorchBackend(TorchModules):
    """Runs the recipe's torch modules in fp32, with weights as the recipe's files store them and its fake-quant."""

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
