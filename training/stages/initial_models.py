"""The models that stage "dit" begins with."""

from __future__ import annotations

from longtake.training.data.embedding_cache import digest_of_state
from longtake.training.models.checkpoint import load_into
from longtake.training.models.load import read_side
from longtake.training.models.text.words import AnyTextEncoder, text_encoder_for
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.stages.options import StageOptions


def initial_models(options: StageOptions) -> tuple[CausalDiT, AnyTextEncoder, str]:
    """Random models, or those of --init; and the text encoder's digest, "" where nothing asks for it."""
    preset, folder = options.preset, options.init
    if folder is None:
        dit, text = CausalDiT(preset.dit), text_encoder_for(preset)
        cached = options.cache_dir is not None and not options.trains_text
        return dit, text, digest_of_state(text) if cached else ""
    text_file, dit_file = folder / "text_encoder.safetensors", folder / "dit.safetensors"
    text = text_encoder_for(preset, read_side(text_file, "text_encoder", preset).vocabulary, folder)
    dit = CausalDiT(preset.dit)
    digest = load_into(text, text_file, kind="text_encoder", preset=preset).sha256
    load_into(dit, dit_file, kind="dit", preset=preset)
    return dit, text, digest
