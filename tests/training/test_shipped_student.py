"""The shipped 4-step student: its folder is whole, and its few steps give a picture where a model that was not distilled gives pale means."""

from __future__ import annotations

import torch

from longtake.files import read_json
from longtake.paths import REPOSITORY
from longtake.training.data.held_out_stories import mixed_stories
from longtake.training.experiment.batched import Rollout, Sampling
from longtake.training.experiment.stories import scripts_of
from longtake.training.models.load import load_models
from longtake.training.models.presets import TINY
from longtake.training.models.quantize import apply_precision
from longtake.training.models.wan.linears import quantized_linears

STUDENT = REPOSITORY / "training/checkpoints/tiny-4step"


def test_the_folder_is_whole() -> None:
    models = load_models(TINY, STUDENT)
    assert set(models.amax) == set(quantized_linears(models.dit))
    facts = read_json(STUDENT / "dit.json")
    assert facts["sampling"] == {"steps": 4, "guidance": 1.0, "shift": 5.0, "timesteps": [999, 937, 833, 624]}
    assert facts["vae_sha256"] == read_json(REPOSITORY / "training/checkpoints/tiny/vae.json")["sha256"]


@torch.no_grad()
def test_its_latents_are_as_strong_as_the_data_s() -> None:
    """A model that was not distilled gives pale means without guidance in so few steps."""
    scripts, cpu = scripts_of(mixed_stories(2, 1, 7), 0), torch.device("cpu")
    deviations = []
    for folder in (STUDENT, REPOSITORY / "training/checkpoints/tiny"):
        models = apply_precision(load_models(TINY, folder), "nvfp4")
        (latents,) = Rollout(models, scripts, Sampling(steps=4, guidance=1.0), cpu)
        deviations.append(float(latents.std()))
    assert 0.9 < deviations[0] < 1.3 and deviations[1] < 0.95 * deviations[0], deviations
