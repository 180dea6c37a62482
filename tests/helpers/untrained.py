"""A preset's models with random weights, whose outputs are not degenerate."""

from __future__ import annotations

import torch
from torch import nn

from longtake.training.models.families import family_of
from longtake.training.models.load import Models
from longtake.training.models.presets import Preset
from longtake.training.models.sana_wm.dit import SanaWMDiT
from longtake.training.models.text.words import text_encoder_for


def random_models(preset: Preset, seed: int = 0) -> Models:
    """Untrained models, with plausible amax."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = family_of(preset)
        dit = family.dit(preset)
        fill_zeros(dit)
        models = Models(preset, dit.eval(), family.vae(preset).eval(), text_encoder_for(preset).eval())
    largest = {name: float(dit.get_submodule(name).weight.detach().abs().amax()) for name in family.linears(dit)}
    models.amax = {name: {"input": 5.0, "weight": weight} for name, weight in largest.items()}
    return models


def fill_zeros(dit: nn.Module) -> None:
    """Give weights to what starts as zeros."""
    weights = [dit.head.head.weight] if not isinstance(dit, SanaWMDiT) else [
        dit.final_layer.linear.weight,
        dit.plucker_embedder.proj.weight,
        *(part.weight for block in dit.blocks for part in (block.plucker_proj, block.attn.out_proj_cam)),
    ]  # fmt: skip
    for weight in weights:
        nn.init.xavier_uniform_(weight)
