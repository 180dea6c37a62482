"""The models that stage "dit" begins with, and the words that its text encoder learns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtake.errors import LongtakeError
from longtake.training.data.embedding_cache import digest_of_state
from longtake.training.models.checkpoint import check_state, load_checkpoint, load_into
from longtake.training.models.families import family_of
from longtake.training.models.load import read_side
from longtake.training.models.text.pretrained import EXPECTED, carry_description, preset_lines, pretrained_text
from longtake.training.models.text.vocabulary import MOST, extended, vocabulary_from_texts
from longtake.training.models.text.words import AnyTextEncoder, TextEncoder, text_encoder_for
from longtake.training.stages.options import StageOptions

logger = logging.getLogger(__name__)


def initial_models(options: StageOptions, captions: Sequence[str]) -> tuple[Any, AnyTextEncoder, str]:
    """Random models, or those of --init; and the text encoder's digest, "" where nothing asks for it.

    A small text encoder that learns has the words of `captions`: as its vocabulary, or behind that of --init.

    Raises:
        LongtakeError: most of the captions' words are unknown to an encoder that does not learn.
    """
    preset, folder = options.preset, options.init
    dit = family_of(preset).dit(preset)
    if folder is None:
        text, digest = new_text_encoder(options, captions), ""
        if options.cache_dir is not None and not options.trains_text:
            digest = digest_of_state(text)
    else:
        text, digest = text_encoder_from(options, folder, captions)
        load_into(dit, folder / "dit.safetensors", kind="dit", preset=preset)
    if isinstance(text, TextEncoder):
        text.tokenizer.check(captions)
    return dit, text, digest


def new_text_encoder(options: StageOptions, captions: Sequence[str]) -> AnyTextEncoder:
    """A text encoder from random weights, or the pretrained one of --text-encoder."""
    preset = options.preset
    if options.text_encoder is not None and preset.text.kind != "pretrained":
        raise LongtakeError(
            f"preset {preset.name} has a text encoder of its own",
            got=f"--text-encoder {options.text_encoder}",
            expected="a preset of kind pretrained",
            fix=f"write a preset file with these lines, and pass it with --preset:\n{preset_lines(options.text_encoder)}",
        )
    if preset.text.kind == "words":
        return text_encoder_for(preset, vocabulary_from_texts(captions))
    if options.text_encoder is not None:
        return pretrained_text(preset.text, options.text_encoder)
    if preset.text.kind == "pretrained":
        what, got = f"preset {preset.name} reads a pretrained text encoder", "none"
        expected, fix = EXPECTED, "pass its folder with --text-encoder"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return text_encoder_for(preset)


def text_encoder_from(options: StageOptions, folder: Path, captions: Sequence[str]) -> tuple[AnyTextEncoder, str]:
    """The text encoder of --init and its digest; one that learns gets a new row for each new word."""
    preset, path = options.preset, folder / "text_encoder.safetensors"
    if options.text_encoder is not None:
        what, got = "--init brings its own text encoder", f"--text-encoder {options.text_encoder}"
        expected, fix = "one of the two", "leave --text-encoder out, or --init"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    words = read_side(path, "text_encoder", preset).vocabulary
    text = text_encoder_for(preset, words, folder)
    if not (options.trains_text and isinstance(text, TextEncoder)):
        return text, load_into(text, path, kind="text_encoder", preset=preset).sha256
    wider = extended(text.vocabulary, captions)
    tensors, side = load_checkpoint(path, kind="text_encoder", preset=preset)
    check_state(text, tensors, str(path))
    if new := len(wider) - len(text.vocabulary):
        logger.info("the text encoder gets %d new words of the captions (at most %d)", new, MOST)
        text = TextEncoder(preset.text, wider)
    fill_rows(text, tensors)
    return text, side.sha256


def leave_tokenizer(text: AnyTextEncoder, out: Path) -> None:
    """Copy the tokenizer of a text encoder that has one in a file into a folder of checkpoints."""
    folder = getattr(text, "tokenizer_folder", None)
    if folder is not None:
        carry_description(folder, out)


@torch.no_grad()
def fill_rows(text: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy `tensors`, of which the first ones may have fewer rows than the module's."""
    for name, own in text.state_dict().items():
        own[: len(tensors[name])].copy_(tensors[name])
