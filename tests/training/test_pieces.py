from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.models.presets import TINY, WAN22_TI2V_5B, TextEncoderConfig
from longtake.training.models.text.sentencepiece import PieceTokenizer, carry_tokenizer, clean
from longtake.training.models.text.words import text_encoder_for, tokenizer_for

CONFIG = TextEncoderConfig(kind="umt5", dim=32, layers=1, heads=2, length=16, ffn_dim=32, vocabulary=64)
READER = replace(WAN22_TI2V_5B.dit, text_dim=CONFIG.dim, text_len=CONFIG.length)
PRESET = replace(WAN22_TI2V_5B, text=CONFIG, dit=READER)
SPECIAL = ("<pad>", "</s>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz,.é"


def write_tokenizer(folder: Path, special: tuple[str, ...] = SPECIAL, template: bool = True) -> Path:
    """A tokenizer.json of umT5's kind: Unigram pieces, words marked by the metaspace, </s> at the end."""
    pieces = [*((name, 0.0) for name in special), ("▁", -4.0), ("▁cat", -2.0), ("▁sat", -2.0)]
    made = tokenizers.Tokenizer(Unigram([*pieces, *((letter, -5.0) for letter in LETTERS)], unk_id=2))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens(list(special))
    if template:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir(parents=True)
    made.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("nasty", "cleaned"),
    [
        ("  a\t cat\r\n\n sat\u3000down ", "a cat sat down"),
        ("&amp;lt;b&amp;gt; caf&eacute;", "<b> café"),
        ("schÃ¶n â€“ doesnâ€™t", "schön – doesn't"),
        ("&amp;amp;amp;", "&"),  # ftfy resolves an entity where the text has no <, then two more rounds
        ("a\x00b\x07c\x1b[31md", "abcd"),
        ("\ud83d\ude00 lone \ud800", "😀 lone \ufffd"),
        ("ﬁne ＡＢＣ", "fine ABC"),
        ("\ufeffbom“quoted”", 'bom"quoted"'),
        ("", ""),
        ("\n \t", ""),
    ],
)
def test_nasty_strings_are_cleaned(nasty: str, cleaned: str) -> None:
    assert clean(nasty) == cleaned


def test_ids_are_hugging_faces(folder: Path) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer/tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    texts = ["a cat sat", "", "x" * 40, "say <pad> or </s> out", "日本 😀", "cat\ud800"]
    ours = text_encoder_for(PRESET, checkpoints=folder).tokenize(texts)
    wanted = theirs([clean(text) for text in texts], padding="max_length", max_length=16, truncation=True,
                    add_special_tokens=True, return_tensors="pt")  # fmt: skip
    assert ours.dtype == torch.int32 and ours.shape == (6, 16)
    assert torch.equal(ours.long(), wanted.input_ids)
    assert ours[1].tolist() == [1] + [0] * 15 and ours[2, -1] == 1


def test_the_end_is_added_where_the_file_does_not(tmp_path: Path, folder: Path) -> None:
    bare = PieceTokenizer.open(write_tokenizer(tmp_path / "bare", template=False) / "tokenizer", 64)
    full = PieceTokenizer.open(folder / "tokenizer", 64)
    texts = ["a cat sat </s>", "", "z" * 50]
    assert torch.equal(bare(texts, 16), full(texts, 16))


@pytest.mark.parametrize("unit", ["cat sat ", "&amp;lt;", "\n", "é", "Ã©", "<", "\ud800", "x"])
def test_a_megabyte_is_cut_at_once_and_said(folder: Path, unit: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenize = PieceTokenizer.open(folder / "tokenizer", 64)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        row = tokenize([unit * (2**20 // len(unit))], 512)[0]
    assert time.monotonic() - start < 5
    assert "characters is cut" in caplog.text
    assert (row == 1).sum() == 1


def test_cutting_leaves_the_tokens_that_fit_alone(folder: Path) -> None:
    tokenize = PieceTokenizer.open(folder / "tokenizer", 64)
    spaced = ("cat" + " " * 3000 + "sat ") * 4
    assert torch.equal(tokenize([spaced], 16), tokenize(["cat sat " * 4], 16))


def test_a_missing_file_is_named_with_its_place(tmp_path: Path) -> None:
    encoder = text_encoder_for(PRESET, checkpoints=tmp_path)
    for ask in (lambda: encoder.tokenize(["a"]), lambda: tokenizer_for(PRESET, None, tmp_path)):
        with pytest.raises(LongtakeError) as caught:
            ask()
        assert "google/umt5-xxl" in str(caught.value) and f"{tmp_path / 'tokenizer' / 'tokenizer.json'}" in str(
            caught.value
        )
    with pytest.raises(LongtakeError, match="without a tokenizer"):
        text_encoder_for(PRESET).tokenize(["a"])


def test_a_spiece_model_alone_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").touch()
    with pytest.raises(LongtakeError, match=r"make it from spiece\.model.*T5Tokenizer"):
        tokenizer_for(PRESET, None, tmp_path)


@pytest.mark.parametrize("place", ["tokenizer", "google/umt5-xxl", "."])
def test_the_file_is_carried_from_wherever_models_have_it(folder: Path, tmp_path: Path, place: str) -> None:
    source, target = tmp_path / "model", tmp_path / "export"
    (source / place).mkdir(parents=True)
    (source / place / "tokenizer.json").write_bytes((folder / "tokenizer" / "tokenizer.json").read_bytes())
    for _ in range(2):
        assert carry_tokenizer(source, target) == target / "tokenizer" / "tokenizer.json"
    assert tokenizer_for(PRESET, None, target)(["a cat"], 16)[0, :3].all()


def test_a_model_without_one_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert carry_tokenizer(tmp_path / "model", tmp_path / "export") is None
    assert str(tmp_path / "export" / "tokenizer" / "tokenizer.json") in caplog.text
    assert not (tmp_path / "export").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.parent.mkdir()
    for content in ("", "{}", "not json", '{"model": {"type": "Unigram"}}'):
        file.write_text(content)
        with pytest.raises(IntegrityError, match="is not a tokenizer"):
            tokenizer_for(PRESET, None, tmp_path)
    other = write_tokenizer(tmp_path / "other", special=("<s>", "<pad>", "</s>"))
    with pytest.raises(IntegrityError, match="not umT5's tokenizer"):
        tokenizer_for(PRESET, None, other)
    small = replace(PRESET, text=replace(CONFIG, vocabulary=20))
    with pytest.raises(IntegrityError, match="at most 20 pieces"):
        tokenizer_for(small, None, write_tokenizer(tmp_path / "large"))


def test_words_need_no_file() -> None:
    assert tokenizer_for(TINY, ("red",), None)(["red blue"], 4).tolist() == [[2, 1, 0, 0]]
    assert text_encoder_for(TINY, ["red"]).vocabulary == ("red",)
    with pytest.raises(LongtakeError, match="clip"):
        replace(TINY, text=replace(TINY.text, kind="clip"))
