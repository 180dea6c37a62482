"""PyTorch itself as a backend: the oracle of checks and tests. Not among the backends a user chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtake.accuracy.compare import recipe_models
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.base import Encoder
from longtake.runtime.backends.host import HostBackend
from longtake.runtime.backends.torch_parts import TorchEncoder
from longtake.training.models.load import Models, load_models
from longtake.training.models.wan.networks import network_module
from longtake.training.models.wan.spec import NETWORKS


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
        self.vocabulary = tuple(plain.vocabulary)
        oracle = recipe_models(plain, recipe.precision)
        self._vae = oracle.vae
        self._modules = {
            name: network_module(oracle, name, recipe.cache, vae_ops=recipe.vae_ops).to(self.device)
            for name in NETWORKS
        }

    @torch.no_grad()
    def call(
        self, network: str, inputs: Mapping[str, Tensor], wanted: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """See HostBackend.call."""
        spec = self.specs[network]
        outputs = self._modules[network](*(inputs[binding.name].to(self.device) for binding in spec.inputs))
        return {binding.name: tensor for binding, tensor in zip(spec.outputs, outputs, strict=True)}

    def new_encoder(self) -> Encoder:
        """See Backend.new_encoder."""
        return TorchEncoder(self._vae, self.device)
