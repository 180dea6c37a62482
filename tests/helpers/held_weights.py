"""What an export takes from models in memory."""

from __future__ import annotations

from longtake.export.weights import Weights
from longtake.training.models.load import Models


def weights_from_models(models: Models) -> Weights:
    """The weights of models in memory."""
    tensors = {"dit": models.dit, "vae": models.vae, "text_encoder": models.text}
    states = {name: module.state_dict() for name, module in tensors.items() if module is not None}
    return Weights(models.preset, states, models.amax, models.vocabulary, models.formats)
