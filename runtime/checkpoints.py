"""A generator's parts from a folder of checkpoints: its preset, its tokenizer, and the export that was made of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from longtake.devices import device_named
from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.formats.exported import Export
from longtake.formats.model_name import home
from longtake.runtime.backends.base import Backend
from longtake.runtime.conditions import Tokenize
from longtake.training.models.checkpoint import side_file, weights_digests
from longtake.training.models.presets import Preset
from longtake.training.models.side_file import SideFile
from longtake.training.models.text.gemma import NAME
from longtake.training.models.text.words import tokenizer_for


def dit_side(folder: Path) -> SideFile:
    """What goes with the DiT in `folder`; its preset is the checkpoint's.

    Raises:
        LongtakeError: there is none.
        IntegrityError: its side file is damaged.
    """
    path = folder / "dit.safetensors"
    for file in (path, side_file(path)):
        if not file.is_file():
            what = f"{folder} holds no checkpoint"
            expected = "dit.safetensors and dit.json, as training and `longtake convert` write them"
            raise LongtakeError(what, got=f"no {file.name}", expected=expected, fix="pass the folder that has them")
    return SideFile.read(side_file(path))


def tokenizer_of(preset: Preset, folder: Path) -> Tokenize:
    """The tokenizer of the text encoder in `folder`; without one, what says so once a prompt is to be encoded."""
    path = folder / "text_encoder.safetensors"
    if path.is_file() and side_file(path).is_file():
        return tokenizer_for(preset, SideFile.read(side_file(path)).vocabulary, folder)

    if preset.text.kind == "gemma2" and (folder / NAME).is_file():
        return tokenizer_for(preset, None, folder)

    def refuse(prompts: list[str], length: int) -> Tensor:
        what = "there is no text encoder for this prompt"
        fix = f"pass embeddings={{{prompts[0]!r}: tensor}}, or copy the encoder there"
        raise LongtakeError(what, got=f"no {path.name} in {folder}", expected="a text encoder, or embeddings", fix=fix)

    return refuse


def checkpoint_backend(
    preset: Preset, folder: Path, dtype: str, device: torch.device | str | None, gpus: int
) -> Backend:
    """PyTorch on the checkpoints in `folder`, on one device or shared by `gpus` of them. Raises what opening it does."""
    from longtake.runtime.backends.torch_modules import CheckpointBackend, checkpoint_recipe

    if gpus == 1:
        return CheckpointBackend(preset, folder, dtype, device_named(device or "cpu"))
    from longtake.runtime.parallel.open import sharded_backend

    return sharded_backend(checkpoint_recipe(preset, dtype), folder, gpus, device, dtype=dtype)


def export_of(preset: Preset, folder: Path) -> Path:
    """The export in bf16 that was made of the weights in `folder`. Raises UnavailableError if there is none."""
    wanted = weights_digests(folder)
    for found in sorted(home().glob(f"*/{preset.name}_bf16*/onnx")):
        try:
            export = Export.find(found)
        except IntegrityError:
            continue
        if export and export.weights == wanted:
            return found
    what, got = f"nothing was exported from the checkpoint in {folder}", f"no export of its weights in {home()}"
    fix = f"longtake export --recipe {preset.name}_bf16_sm90 --checkpoints {folder}"
    raise UnavailableError(what, got=got, expected="one in bf16, for ONNX Runtime to run", fix=fix)
