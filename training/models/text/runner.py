"""Embeddings of prompts outside an engine: the preset's text encoder as a function of token ids, prompts seen last kept.

A backend without a text-encoder engine (presets of kind "umt5", see `umt5_paged`, and "pretrained") calls it from its `text`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from longtake.paths import REPOSITORY
from longtake.training.models.presets import Preset

KEPT = 8  # prompts; of umT5-XXL's 8 MB each


class TextRunner:
    """tokens int32 [P, E] -> embeddings fp32 [P, E, dim] on the device, rows of padding zero. Don't write to them."""

    def __init__(self, encode: Callable[[Tensor], Tensor], kept: int = KEPT) -> None:
        self.encode, self.kept = encode, kept
        self._seen: OrderedDict[tuple[int, bytes], Tensor] = OrderedDict()

    def __call__(self, tokens: Tensor) -> Tensor:
        tokens = tokens.cpu()
        key = len(tokens), tokens.numpy().tobytes()
        if key not in self._seen:
            self._seen[key] = self.encode(tokens)
        self._seen.move_to_end(key)
        while len(self._seen) > self.kept:
            self._seen.popitem(last=False)
        return self._seen[key]


def text_runner_for(
    preset: Preset,
    checkpoints: Path | None,
    device: torch.device,
    *,
    storage: str = "bf16",
    resident: bool = False,
) -> TextRunner:
    """The text encoder of the checkpoints in a folder (the preset's own if None), as a function of token ids.

    Args:
        storage, resident: of a "umt5" encoder, see `PagedUMT5`; `umt5_paged.device_bytes` says beforehand what it takes.

    Raises:
        LongtakeError: the checkpoint is missing, or of another preset.
        IntegrityError: it is damaged, or lacks a weight.
    """
    folder = Path(checkpoints) if checkpoints is not None else REPOSITORY / preset.checkpoints
    if preset.text.kind == "umt5":
        return TextRunner(_paged(preset, folder, device, storage, resident))
    if preset.text.kind == "gemma2":
        from longtake.training.models.text.gemma import gemma_runner

        return TextRunner(gemma_runner(preset.text, folder, device))
    return TextRunner(_whole(preset, folder, device))


def _paged(
    preset: Preset, folder: Path, device: torch.device, storage: str, resident: bool
) -> Callable[[Tensor], Tensor]:
    from longtake.training.models.checkpoint import load_checkpoint
    from longtake.training.models.text.umt5_paged import PagedUMT5, source_from_state

    state, _ = load_checkpoint(folder / "text_encoder.safetensors", kind="text_encoder", preset=preset)
    return PagedUMT5(preset.text, source_from_state(state), device, storage, resident)


def _whole(preset: Preset, folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    from longtake.training.models.checkpoint import load_into
    from longtake.training.models.load import read_side
    from longtake.training.models.text.words import text_encoder_for

    path = folder / "text_encoder.safetensors"
    encoder = text_encoder_for(preset, read_side(path, "text_encoder", preset).vocabulary, folder)
    load_into(encoder, path, kind="text_encoder", preset=preset)
    encoder.to(device).eval()

    @torch.no_grad()
    def encode(tokens: Tensor) -> Tensor:
        return encoder(tokens.to(device))

    return encode
