"""Gemma from a local folder: which positions are kept, its mask, and what is said where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.models.preset_parts import TextEncoderConfig
from longtake.training.models.text.gemma import (
    KIND,
    NAME,
    GemmaSource,
    GemmaTokenizer,
    gemma_runner,
    instruction_from_config,
    kept_positions,
)

LINES = ("say what is seen", "then how it moves : ")
CONFIG = TextEncoderConfig("gemma2", 16, 2, 2, 8, 32, 40)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma of two layers over a vocabulary of words, and checkpoints that tell of it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    gemma, checkpoints = tmp_path_factory.mktemp("gemma"), tmp_path_factory.mktemp("checkpoints")
    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *dict.fromkeys(" ".join((*LINES, "a red room with two doors")).split()),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(gemma)
    config = transformers.Gemma2Config(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                       num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8)  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma2Model(config).save_pretrained(gemma)
    KIND.write(GemmaSource(str(gemma), LINES), checkpoints / NAME)
    return checkpoints


def test_the_kept_positions_have_seen_the_instruction(folder: Path) -> None:
    tokenizer, run = GemmaTokenizer.open(folder), gemma_runner(CONFIG, folder, CPU)
    tokens = tokenizer(["a red room"], 8)
    count = len(tokenizer.tokenizer.encode("\n".join(LINES)))
    assert tokens.dtype == torch.int32 and tokens.shape == (1, count + 6)
    got = run(tokens)
    assert got.shape == (1, 8, 16) and kept_positions(10, 4) == [0, 7, 8, 9]
    # BOS, the instruction's last token, the prompt's three, then padding
    assert [bool(row.any()) for row in got[0]] == [True] * 5 + [False] * 3
    import transformers

    model: Any = transformers.AutoModel.from_pretrained(GemmaSource.find(folder).folder).eval()
    with torch.no_grad():
        whole = model(input_ids=tokens[:, : count + 3].long()).last_hidden_state[0]
    wanted = torch.cat((whole[:1], whole[count - 1 :]))
    assert float((got[0, :5] - wanted).abs().max()) < 1e-5


def test_long_prompts_are_cut(folder: Path) -> None:
    tokens = GemmaTokenizer.open(folder)(["room " * 50], 8)
    assert bool((tokens != 0).all())


def test_what_is_said_where_it_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match=r"(?s)Gemma 2, is not known here.*convert --text GEMMA_FOLDER"):
        GemmaTokenizer.open(tmp_path)
    KIND.write(GemmaSource("/nowhere"), tmp_path / NAME)
    with pytest.raises(LongtakeError, match=r"(?s)not where .*says.*got: /nowhere"):
        gemma_runner(CONFIG, tmp_path, CPU)
    other = TextEncoderConfig("gemma2", 24, 2, 2, 8, 32, 40)
    with pytest.raises(IntegrityError, match=r"(?s)another text encoder.*width 16, 40 tokens.*width 24"):
        gemma_runner(other, folder, CPU)


def test_the_instruction_is_read_from_a_released_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text("text_encoder:\n  chi_prompt:\n    - one line\n    - another\n")
    assert instruction_from_config(tmp_path / "config.yaml") == ("one line", "another")
    assert "is not the one that SANA-WM was released with" in caplog.text
    (tmp_path / "other.yaml").write_text("text_encoder: {}\n")
    with pytest.raises(LongtakeError, match="has no instruction"):
        instruction_from_config(tmp_path / "other.yaml")
