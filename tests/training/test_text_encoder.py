from __future__ import annotations

import logging

import pytest
import torch

from longtake.training.models.presets import TINY
from longtake.training.models.text.words import PADDING, UNKNOWN, TextEncoder, default_vocabulary, tokenize

CAPTION = "The scene transitions. A green seven drifts left over a dark blue background, soft light"


def test_every_word_of_a_caption_is_known() -> None:
    row = tokenize([CAPTION], 32)[0]
    assert row.dtype == torch.int32 and (row[:15] > UNKNOWN).all() and (row[15:] == PADDING).all()
    assert torch.equal(row, tokenize([CAPTION.upper()], 32)[0])


def test_unknown_words_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        row = tokenize(["a purple zeppelin"], 8)[0]
        tokenize(["a green zeppelin"], 8)
    assert row.tolist()[2:4] == [UNKNOWN, PADDING]
    assert [record.getMessage().count("zeppelin") for record in caplog.records] == [1]


def test_long_prompts_are_truncated_and_empty_ones_are_all_padding() -> None:
    assert (tokenize(["seven " * 100], 32) > UNKNOWN).all()
    assert not tokenize([""], 32).any()


@torch.no_grad()
def test_padding_comes_out_zero_and_does_not_change_the_words() -> None:
    encoder = TextEncoder(TINY.text).eval()
    out = encoder(tokenize(["a green seven", "a green seven rises", ""], 32))
    assert out.shape == (3, 32, 128) and out.dtype == torch.float32 and out.isfinite().all()
    assert not out[0, 3:].any() and not out[2].any() and out[0, :3].any(-1).all()
    assert not torch.allclose(out[0, :3], out[1, :3])
    short = TextEncoder(TINY.text).eval()
    short.load_state_dict({**encoder.state_dict(), "position": encoder.position})
    assert torch.allclose(short(tokenize(["a green seven"], 32))[0, :3], out[0, :3], atol=1e-6)


def test_vocabulary_is_closed_sorted_and_small() -> None:
    words = default_vocabulary()
    assert list(words) == sorted(set(words)) and {"seven", "drifts", "transitions"} <= set(words) and len(words) < 100
