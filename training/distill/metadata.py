"""What distillation writes beside the student's checkpoint: what it is, and how it is sampled."""

from __future__ import annotations

from typing import Any

from longtake.training.distill.options import DistillOptions
from longtake.training.models.sampler import model_timesteps


def student_metadata(
    options: DistillOptions, vae_digest: str, teacher_digest: str, amax: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Facts of the student's DiT. amax: of its quantized linears, for the present weights."""
    steps, shift = options.student_steps, options.preset.sampling.shift
    lora = {"rank": options.lora_rank, "alpha": options.lora_alpha or options.lora_rank}
    numerics = {"nvfp4": {**options.rules.as_json(), "gradient": None}} if options.precision == "nvfp4" else {}
    return {
        # what exports record, and `generate`, `check` and `budget` follow
        "sampling": {"steps": steps, "guidance": 1.0, "shift": shift, "timesteps": list(model_timesteps(steps, shift))},
        "data": options.data,
        "chunks": list(options.chunks),
        "return_distance": options.return_distance and list(options.return_distance),
        "batch": options.batch,
        "context": "window",
        "i2v": float(options.i2v),
        "vae_sha256": vae_digest,
        "precision": options.precision,
        **numerics,
        "amax": amax,
        "distillation": {
            "method": "dmd",
            "teacher_sha256": teacher_digest,
            "guidance": options.guidance,
            "critic_updates": options.critic_updates,
            "cache": options.cache,
            "score_context": options.score_context,
            "rollout": options.rollout and list(options.rollout),
            "lora": lora if options.lora_rank else None,  # None: all weights were trained
        },
    }
