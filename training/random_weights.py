"""Checkpoints of any preset with random content, written tensor by tensor.

For trying a preset whose weights are not at hand: exports, builds, checks, memory. They are the bench's weights
(`runtime.bench.random_weights`): variances of 1 / fan_in, norms of one, so that activations keep their scale.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longtake.files import atomic_path, require_disk, write_json
from longtake.training.models.checkpoint import FORMAT, side_file, versions
from longtake.training.models.load import weights_dtype
from longtake.training.models.presets import Preset
from longtake.training.models.random_weights import bound, random_weight
from longtake.training.models.wan.linears import quantized_linears

KINDS = ("dit", "vae", "text_encoder")
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64"}
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
    metas: dict[str, dict[str, Any]] = {kind: {"kind": kind, "preset": preset.name} for kind in kinds}
    if "dit" in metas:
        weights = {name: models.dit.get_parameter(f"{name}.weight") for name in quantized_linears(models.dit)}
        metas["dit"]["amax"] = {
            name: {"input": INPUT_AMAX, "weight": bound(f"{name}.weight", tuple(weight.shape))}
            for name, weight in weights.items()
        }
    if "text_encoder" in metas and models.vocabulary:
        metas["text_encoder"]["vocabulary"] = list(models.vocabulary)
    return [_write(folder / f"{kind}.safetensors", states[kind], metas[kind], seed) for kind in kinds]


def _typed(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def _write(path: Path, state: dict[str, Tensor], meta: dict[str, Any], seed: int) -> Path:
    """A safetensors file (length, JSON header, tensors one after the other) with its side file."""
    digest = hashlib.sha256()
    with atomic_path(path) as partial, open(partial, "wb") as file:
        for piece in _pieces(path, state, seed):
            digest.update(piece)
            file.write(piece)
        file.flush()
        side = {"format": FORMAT, **meta, "random_seed": seed, "sha256": digest.hexdigest(), "versions": versions()}
        write_json(side_file(path), side)
    return path


def _pieces(path: Path, state: dict[str, Tensor], seed: int) -> Iterator[bytes]:
    header, end = {}, 0
    for name, tensor in state.items():
        places = [end, end + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        end = places[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name, tensor in tqdm(state.items(), desc=path.name, unit="tensor", leave=False, disable=None):
        key = name if seed == 0 else f"{seed}:{name}"
        value = random_weight(key, tuple(tensor.shape), CPU, tensor.dtype)
        yield value.reshape(-1).view(torch.uint8).numpy().tobytes()
