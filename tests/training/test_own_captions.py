"""A small text encoder learns the words of any captions; a pretrained one stands in for it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.errors import LongtakeError
from longtake.training.data.latent_cache import tokens_of
from longtake.training.models.checkpoint import load_checkpoint, save_checkpoint
from longtake.training.models.presets import TINY, Preset
from longtake.training.models.side_file import SideFile
from longtake.training.models.text.grammar import caption_words
from longtake.training.models.text.runner import text_runner_for
from longtake.training.models.text.vocabulary import extended, vocabulary_from_texts
from longtake.training.models.text.words import (
    INSIDE,
    TextEncoder,
    Tokenizer,
    default_vocabulary,
    text_encoder_for,
    tokenizer_for,
    words_of,
)
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.stages.initial_models import initial_models, leave_tokenizer
from longtake.training.stages.options import StageOptions

CAPTIONS = ["a man laughs in a car", "a dog sleeps in a box", "犬が走る", "un café tranquille"]
UNTOLD = "a green seven drifts left"


def test_words_of_any_script() -> None:
    assert words_of("A dog's Cafe\u0301, 犬が हिन्दी 😀!") == ["a", "dog", "s", "café", "犬", "が", "हिन्दी", "😀"]


def test_the_grammars_words_are_the_shipped_vocabulary() -> None:
    assert vocabulary_from_texts([" ".join(caption_words())]) == default_vocabulary()


def test_each_caption_reads_as_itself() -> None:
    tokenizer = Tokenizer(vocabulary_from_texts(CAPTIONS))
    rows = tokenizer(CAPTIONS, 32)
    assert len({tuple(row.tolist()) for row in rows}) == len(CAPTIONS) and not (rows == 1).any()


def _many(count: int) -> list[str]:
    """Captions with `count` words that differ."""
    letters = "abcdefghij"
    return ["".join(letters[int(digit)] for digit in f"{i:05d}") for i in range(count)]


def test_more_words_than_rows_are_made_of_pieces() -> None:
    texts = _many(300) + ["dog"] * 50
    vocabulary = vocabulary_from_texts(texts, 100)
    tokenizer = Tokenizer(vocabulary)
    tokens = [tokenizer.tokens(text) for text in texts]
    assert len(vocabulary) <= 100 and any(piece.startswith(INSIDE) for piece in vocabulary) and "dog" in vocabulary
    assert None not in tokens and len({tuple(row or ()) for row in tokens}) == 301
    assert vocabulary == vocabulary_from_texts(texts, 100)


def test_new_words_come_behind_the_old_ones_and_are_bounded() -> None:
    old = default_vocabulary()
    assert extended(old, ["a red seven", "a zebra"]) == (*old, "zebra")
    wider = extended(old, _many(300), 100)
    assert wider[: len(old)] == old and 0 < len(wider) - len(old) <= 100
    assert all(Tokenizer(wider).tokens(word) for word in _many(300))
    begun = time.process_time()
    assert len(Tokenizer(wider).tokens("aj" * 4000) or ()) > 100  # by every end of the rest it would be half a minute
    assert time.process_time() - begun < 3


def test_a_few_unknown_words_are_said_as_a_share_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(default_vocabulary())
    with caplog.at_level(logging.WARNING):
        tokenizer([f"{UNTOLD} beside a zebra"], 32)
        tokenizer([f"{UNTOLD} beside a zebra"], 32)
    assert [record.getMessage() for record in caplog.records] == [
        "the text encoder doesn't know 2 of 8 words (25 %), which read as <unk>: 'beside', 'zebra'"
    ]


def test_mostly_unknown_words_are_refused() -> None:
    with pytest.raises(LongtakeError, match="does not know most of these words") as error:
        Tokenizer(default_vocabulary())(["a dog sleeps in a box"], 32)
    assert "4 of 6 unknown" in str(error.value)
    assert "--init" in str(error.value)


def test_held_out_captions_may_have_words_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    text = text_encoder_for(TINY)

    class Data:
        split = "eval"

    with caplog.at_level(logging.WARNING):
        assert (tokens_of(text, ["a zebra yawns"], Data()) == 1).sum() == 2  # type: ignore[arg-type]
    assert "2 of 3 words (67 %)" in caplog.text
    Data.split = "train"
    with pytest.raises(LongtakeError, match="does not know most"):
        tokens_of(text, ["a zebra yawns"], Data())  # type: ignore[arg-type]


@pytest.fixture
def init(tmp_path: Path, small_preset: Preset) -> Path:
    """Checkpoints of the shipped grammar's words, random weights."""
    folder = tmp_path / "init"
    folder.mkdir()
    torch.manual_seed(1)
    side = SideFile.of({"kind": "text_encoder", "preset": "small", "vocabulary": list(default_vocabulary())})
    save_checkpoint(folder / "text_encoder.safetensors", text_encoder_for(small_preset).state_dict(), side)
    save_checkpoint(folder / "dit.safetensors", CausalDiT(small_preset.dit).state_dict(), SideFile("dit", "small"))
    return folder


def test_init_keeps_old_rows_and_ids_and_adds_new_ones(init: Path, small_preset: Preset) -> None:
    options = StageOptions(preset=small_preset, init=init)
    _, text, _ = initial_models(options, CAPTIONS)
    saved, _ = load_checkpoint(init / "text_encoder.safetensors", kind="text_encoder", preset="small")
    assert isinstance(text, TextEncoder)
    old = len(default_vocabulary())
    assert text.vocabulary[:old] == default_vocabulary() and {"dog", "box", "犬"} <= set(text.vocabulary[old:])
    rows = saved["embedding.weight"]
    assert torch.equal(text.embedding.weight[: len(rows)], rows)
    assert text.embedding.weight[len(rows) :].any(1).all()
    for name, tensor in text.state_dict().items():
        assert torch.equal(tensor[: len(saved[name])], saved[name]), name
    _, same, _ = initial_models(options, [UNTOLD])
    assert same.vocabulary == default_vocabulary() and torch.equal(same.embedding.weight, rows)  # type: ignore[union-attr]


def test_a_frozen_encoder_gets_no_rows_and_refuses_other_captions(init: Path, small_preset: Preset) -> None:
    options = StageOptions(preset=small_preset, init=init, freeze_text=True)
    _, text, _ = initial_models(options, [UNTOLD])
    assert text.vocabulary == default_vocabulary()
    with pytest.raises(LongtakeError, match="does not know most"):
        initial_models(options, CAPTIONS)


def test_random_weights_learn_the_captions_words(small_preset: Preset) -> None:
    _, text, _ = initial_models(StageOptions(preset=small_preset), CAPTIONS)
    assert text.vocabulary == vocabulary_from_texts(CAPTIONS) and "seven" not in text.vocabulary


def pretrained_folder(folder: Path, kind: str, width: int = 32) -> torch.nn.Module:
    """A small encoder of a kind as transformers saves it; returns it."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    library.train_from_iterator(CAPTIONS, trainer)
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    library.save(str(folder / "tokenizer.json"))
    torch.manual_seed(2)
    if kind == "bert":
        model: torch.nn.Module = BertModel(
            BertConfig(
                vocab_size=120, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
            )
        )
    else:
        model = T5EncoderModel(T5Config(vocab_size=120, d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "t5"])
@torch.no_grad()
def test_a_pretrained_encoder_gives_what_transformers_gives(tmp_path: Path, kind: str, small_preset: Preset) -> None:
    model = pretrained_folder(tmp_path / "encoder", kind)
    preset = replace(small_preset, name="own", text=replace(small_preset.text, kind="pretrained"))
    options = StageOptions(preset=preset, text_encoder=tmp_path / "encoder")
    _, text, _ = initial_models(options, CAPTIONS)
    tokens = text.tokenize([CAPTIONS[0], ""])
    words = int((tokens[0] != 0).sum())
    expected = model(input_ids=tokens[:1, :words].long() - 1).last_hidden_state
    found = text(tokens)
    assert not any(p.requires_grad for p in text.parameters()) and not options.trains_text
    assert torch.allclose(found[:1, :words], expected, atol=1e-5) and not found[:, words:].any()
    assert not text(torch.zeros_like(tokens)).any()


def test_a_pretrained_encoder_that_does_not_fit_says_the_presets_lines(
    tmp_path: Path, small_preset: Preset, init: Path
) -> None:
    pretrained_folder(tmp_path / "encoder", "bert", 48)
    preset = replace(small_preset, name="own", text=replace(small_preset.text, kind="pretrained"))
    with pytest.raises(LongtakeError, match="text_dim: 48"):
        initial_models(StageOptions(preset=preset, text_encoder=tmp_path / "encoder"), CAPTIONS)
    with pytest.raises(LongtakeError, match="--text-encoder"):
        initial_models(StageOptions(preset=preset), CAPTIONS)
    with pytest.raises(LongtakeError, match="kind: pretrained"):
        initial_models(StageOptions(preset=small_preset, text_encoder=tmp_path / "encoder"), CAPTIONS)
    with pytest.raises(LongtakeError, match="brings its own text encoder"):
        initial_models(StageOptions(preset=small_preset, init=init, text_encoder=tmp_path / "encoder"), CAPTIONS)
    told = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({**told, "model_type": "nonesuch"}))
    with pytest.raises(LongtakeError, match="does not know"):
        initial_models(StageOptions(preset=preset, text_encoder=tmp_path / "encoder"), CAPTIONS)


@torch.no_grad()
def test_a_pretrained_encoder_travels_with_the_checkpoint(tmp_path: Path, small_preset: Preset) -> None:
    pretrained_folder(tmp_path / "encoder", "bert")
    preset = replace(small_preset, name="own", text=replace(small_preset.text, kind="pretrained"))
    _, text, _ = initial_models(StageOptions(preset=preset, text_encoder=tmp_path / "encoder"), CAPTIONS)
    out = tmp_path / "out"
    side = SideFile.of({"kind": "text_encoder", "preset": "own", "vocabulary": []})
    save_checkpoint(out / "text_encoder.safetensors", text.state_dict(), side)
    save_checkpoint(out / "dit.safetensors", CausalDiT(preset.dit).state_dict(), SideFile("dit", "own"))
    leave_tokenizer(text, out)
    shutil.rmtree(tmp_path / "encoder")
    tokens = tokenizer_for(preset, (), out)(CAPTIONS, preset.text.length)
    expected = text(tokens)
    assert torch.equal(text_runner_for(preset, out, torch.device("cpu"))(tokens), expected)
    _, again, _ = initial_models(StageOptions(preset=preset, init=out), CAPTIONS)
    assert torch.equal(again(again.tokenize(CAPTIONS)), expected)
