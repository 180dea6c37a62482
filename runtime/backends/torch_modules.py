"""PyTorch itself as a backend: a family's modules with the weights of a folder of checkpoints, nothing exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.formats.recipe import Gate, Recipe
from longtake.runtime.backends.host import HostBackend
from longtake.training.models.checkpoint import weights_digests
from longtake.training.models.families import family_of
from longtake.training.models.load import KINDS, load_models
from longtake.training.models.presets import Preset


class TorchModules(HostBackend):
    """Runs modules, one a network, in the dtype of their weights."""

    name = "torch"
    _modules: Mapping[str, nn.Module]

    def has(self, network: str) -> bool:
        """See Backend.has."""
        return network in self._modules

    @torch.no_grad()
    def call(self, network: str, inputs: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        """See HostBackend.call."""
        spec = self.specs[network]
        outputs = self._modules[network](*(inputs[binding.name].to(self.device) for binding in spec.inputs))
        return {binding.name: tensor for binding, tensor in zip(spec.outputs, outputs, strict=True)}


class CheckpointBackend(TorchModules):
    """The networks whose checkpoints a folder holds; a DiT alone will do.

    Under "fp32" nothing is rounded to bf16: weights, activations and cache are fp32 throughout. Under "bf16" they are what a
    GPU has: bf16 but for what the models compute in fp32.
    """

    def __init__(self, preset: Preset, folder: Path, dtype: str = "fp32", device: torch.device | None = None) -> None:
        """Load the weights that are there, digests verified.

        Raises:
            LongtakeError: there is no DiT, one is of another preset, or `dtype` is another one.
            IntegrityError: a file is damaged.
        """
        if dtype not in ("fp32", "bf16"):
            expected, fix = "'fp32' or 'bf16'", "export a recipe of that precision: longtake export --recipe NAME"
            raise LongtakeError("PyTorch does not run in this dtype", got=repr(dtype), expected=expected, fix=fix)
        self.dtype, recipe = dtype, checkpoint_recipe(preset, dtype)
        super().__init__(recipe, f"PyTorch in {dtype}", device or torch.device("cpu"), preset, folder)
        networks = [name for name in self.specs if name in family_of(preset).networks(preset)]
        there = [kind for kind in KINDS if (folder / f"{kind}.safetensors").is_file()]
        kinds = {"dit", *(kind for kind in there if kind != "text_encoder" or kind in networks)}
        models = load_models(preset, folder, DTYPES[dtype].torch, kinds)
        self.weights, self.vocabulary = weights_digests(folder), models.vocabulary
        self._modules = {
            name: family_of(preset).module(models, recipe, name).to(self.device)
            for name in networks
            if checkpoint_of(name) in kinds
        }

    def stored(self, dtype: str) -> torch.dtype:
        """See HostBackend.stored."""
        return DTYPES[dtype].torch if self.dtype == "bf16" else super().stored(dtype)


def checkpoint_recipe(preset: Preset, dtype: str) -> Recipe:
    """What checkpoints of `preset` run as, in `dtype`: nothing is quantized, and nothing measured against its gate."""
    gate = Gate(dit=1, vae=1, text_encoder=1, context=1, ssim=0)
    return Recipe(f"{preset.name}_{dtype}", preset.name, "bf16", "bf16", "0.0", "segmented", gate)


def checkpoint_of(network: str) -> str:
    """The kind of checkpoint that holds a network's weights."""
    return "vae" if network.startswith("vae") else "text_encoder" if network == "text_encoder" else "dit"
