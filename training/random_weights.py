"""Checkpoints of any preset with random content, written tensor by tensor.

For trying a preset whose weights are not at hand: exports, builds, checks, memory. They are made like the bench's weights
(`runtime.bench.random_weights`): variances of 1 / fan_in, norms of one, so that activations keep their scale.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from longtake.files import require_disk
from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.families import family_of
from longtake.training.models.load import weights_dtype
from longtake.training.models.presets import Preset
from longtake.training.models.random_weights import bound, random_weight
from longtake.training.models.side_file import SideFile

KINDS = ("dit", "vae", "text_encoder")
INPUT_AMAX = 6.0  # of activations: a LayerNorm's output of some thousand values seldom exceeds it
CPU = torch.device("cpu")


def write_random_checkpoints(
    preset: Preset, folder: Path, seed: int = 0, kinds: tuple[str, ...] | list[str] = KINDS
) -> list[Path]:
    """Write `kind`.safetensors and its side file for each of `kinds`, bf16 for large presets and fp32 for small ones.

    Raises:
        LongtakeError: not enough disk space.
    """
    from longtake.training.models.load import meta_models

    models = meta_models(preset)
    modules = {"dit": models.dit, "vae": models.vae, "text_encoder": models.text}
    dtype = weights_dtype(*modules.values()) or torch.bfloat16
    states = {kind: _typed(modules[kind].state_dict(), dtype) for kind in kinds}
    require_disk(folder, sum(t.nbytes for state in states.values() for t in state.values()))
    sides = {
        kind: SideFile(kind, preset.name, preset_digests=preset.digests, facts={"random_seed": seed}) for kind in kinds
    }
    if "dit" in sides:
        weights = {name: models.dit.get_parameter(f"{name}.weight") for name in family_of(preset).linears(models.dit)}
        amax = {
            name: {"input": INPUT_AMAX, "weight": bound(f"{name}.weight", tuple(weight.shape))}
            for name, weight in weights.items()
        }
        sides["dit"] = replace(sides["dit"], amax=amax)
    if "text_encoder" in sides and models.vocabulary:
        sides["text_encoder"] = replace(sides["text_encoder"], vocabulary=models.vocabulary)
    return [_write(folder / f"{kind}.safetensors", states[kind], sides[kind], seed) for kind in kinds]


def _typed(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def _write(path: Path, state: dict[str, Tensor], side: SideFile, seed: int) -> Path:
    def make(name: str) -> Tensor:
        key = name if seed == 0 else f"{seed}:{name}"
        return random_weight(key, tuple(state[name].shape), CPU, state[name].dtype, inline=0)

    with tqdm(total=len(state), desc=path.name, unit="tensor", leave=False, disable=None) as bar:
        save_checkpoint(path, state, side, make, lambda done: bar.update())
    return path
