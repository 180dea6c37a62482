"""What stage "dit" writes beside its checkpoints: what they were trained on and how, which exports follow."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from longtake.options import recorded
from longtake.training.models.families import family_of
from longtake.training.options import DIT
from longtake.training.stages.options import StageOptions


def dit_metadata(
    options: StageOptions, vae_digest: str, vocabulary: list[str], amax: dict[str, dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Module name -> facts: amax of the quantized linears, vocabulary, and what it was trained on."""
    sampling = options.preset.sampling
    own_shift = {"shift": sampling.shift} if "camera" in family_of(options.preset).can else {}
    shared = {
        **recorded(options, DIT),
        "error_recycling": asdict(options.recycling) if options.recycling else None,
        "vae_sha256": vae_digest,
        "sampling": {"steps": sampling.steps, "guidance": sampling.guidance, **own_shift},
    }
    return {
        "dit": {**shared, "precision": options.precision, **numerics(options), "amax": amax},
        "text_encoder": {**shared, "vocabulary": vocabulary},
    }


def numerics(options: StageOptions) -> dict[str, Any]:
    """How the DiT was quantized in training, which exports of it follow; nothing in bf16."""
    if options.precision != "nvfp4":
        return {}
    gradient = {"rule": options.rules.gradient, "emulated": True} if options.quantize_gradients else None
    return {"nvfp4": {**options.rules.as_json(), "gradient": gradient}}
