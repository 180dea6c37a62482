"""What a server says of its model: sizes, lengths, how it is sampled, what it can, what was measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from longtake.errors import LongtakeError
from longtake.formats.model_name import full_name
from longtake.runtime.generator import Generator
from longtake.runtime.serve.fragments import CODECS, codec_for, fragment
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.snapshot import identity_of
from longtake.runtime.story import frame_count
from longtake.training.models.text.words import Tokenizer


def description(generator: Generator) -> dict[str, Any]:
    """Plain data that a front needs of a worker; `model` is the name that clients know it by."""
    backend, preset = generator.backend, generator.backend.preset
    sampling, model = generator.sampling, generator.model
    first, later = frame_count(preset, 1), frame_count(preset, 1, continued=True)
    options = SessionOptions(
        0, sampling.steps, sampling.guidance, preset.negative_prompt, sampling.shift, solver=model.family.solver
    )
    budget = generator.budget
    return {
        "model": full_name(str(backend.made_of.get("model", "")), backend.recipe.name),
        "preset": preset.name,
        "width": preset.width,
        "height": preset.height,
        "fps": preset.fps,
        "first_chunk_frames": first,
        "chunk_frames": later,
        "chunk_s": later / preset.fps,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "negative_prompt": preset.negative_prompt,
        "shift": sampling.shift,
        "timesteps": list(preset.sampling.listed),
        "solver": model.family.solver,
        "codecs": {name: told for name in CODECS if (told := _codec(name, preset.width, preset.height, preset.fps))},
        "words": generator.tokenize.vocabulary if isinstance(generator.tokenize, Tokenizer) else None,
        "can": {
            "prompt": True,
            "cut": can_cut(generator),
            "image": can_encode(generator),
            "clip": can_encode(generator),
            "camera": "camera" in model.family.can,
        },
        "identity": asdict(identity_of(model, options, noise=True, embeddings=True)),
        "backend": backend.name,
        "reason": backend.reason,
        "gpu": torch.cuda.get_device_name(backend.device) if backend.device.type == "cuda" else None,
        "session_gb": session_gb(generator),
        "budget_bytes": budget.total() if budget else None,
    }


def session_gb(generator: Generator) -> float | None:
    """What one more session takes on the GPU beside the weights, by the budget; None where nothing is budgeted."""
    if generator.budget is None:
        return None
    terms = [term.bytes for term in generator.budget.terms if "cache" in term.name]
    return round(sum(terms) / 1e9, 3)


def can_cut(generator: Generator) -> bool:
    """Whether the family knows shots: a cut that changes nothing of what a chunk reads is none."""
    return "cut" in generator.model.family.can


def can_encode(generator: Generator) -> bool:
    """Whether a video can start from a picture or clip: the VAE's encoder is exported, or its checkpoint lies there."""
    backend = generator.backend
    if backend.has("vae_encoder_first"):
        return True
    folder = backend.checkpoints
    return bool(folder and (folder / "vae.safetensors").is_file())


def _codec(name: str, width: int, height: int, fps: int) -> dict[str, str] | None:
    """The encoder that opens here, and the media type of what it writes at this size."""
    try:
        codec = codec_for(name, width, height, fps)
        blank = fragment(np.zeros((1, height, width, 3), np.uint8), 0, 0, codec)
    except LongtakeError:
        return None
    return {"encoder": codec.encoder, "mime": blank.mime}
