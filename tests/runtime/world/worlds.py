"""What the tests of small worlds share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from torch import Tensor

from longtake.runtime.chunk import Chunk
from longtake.runtime.session import Session
from longtake.training.models.families import preset_from_file
from longtake.training.models.presets import Preset

SMALL = "small"
YAML = """
base: world-tiny
dit: {dim: 32, ffn_dim: 48, layers: 4, heads: 2, channels: 8, text_dim: 16, text_len: 8}
vae:
  z_channels: 8
  encoder_widths: [8, 8, 16]
  decoder_widths: [8, 16, 32]
text: {dim: 16, layers: 1, heads: 2, length: 8}
sampling: {steps: 2, timesteps: [1000, 727]}
height: 48
width: 64
"""


def small_preset(folder: Path) -> Preset:
    path = folder / f"{SMALL}.yaml"
    path.write_text(YAML)
    return preset_from_file(path)


def picture(height: int = 96, width: int = 128) -> np.ndarray:
    """Colours that change across it."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack((rows * 255 // height, columns * 255 // width, (rows + columns) % 256), -1).astype(np.uint8)


def digest(session: Session) -> str:
    """Of the slots that the next chunk reads."""
    hashed, here = hashlib.sha256(), session._position
    inputs = here.slots.plan(False).inputs
    for name, tensor in session._state.tensors().items():
        wanted = inputs["table"][:-1] if "keys" in name or "values" in name else inputs["read_slot"]
        for slot in wanted:
            hashed.update(tensor[slot].contiguous().numpy().tobytes())
    return hashed.hexdigest()


def latents(chunks: list[Chunk]) -> list[Tensor]:
    return [chunk.latents for chunk in chunks]
