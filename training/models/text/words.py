"""Word tokenizer and the small trainable text encoder; presets of kind "umt5" have umT5 behind the same interface.

Legend: P prompts, E tokens of a prompt (padded), V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.errors import LongtakeError
from longtake.training.models.presets import Preset, TextEncoderConfig
from longtake.training.models.text.gemma import GemmaText, GemmaTokenizer
from longtake.training.models.text.sentencepiece import FOLDER, PieceTokenizer
from longtake.training.models.text.umt5 import UMT5

logger = logging.getLogger(__name__)

PADDING, UNKNOWN = 0, 1
RESERVED = ("<pad>", "<unk>")


@cache
def default_vocabulary() -> tuple[str, ...]:
    """Lower-case words of the shipped data sets' caption grammar, in token order after RESERVED."""
    from longtake.training.models.text.grammar import caption_words

    return tuple(sorted(set(caption_words())))


class Tokenizer:
    """Lower-case words (punctuation is dropped) to ids; a word outside the closed vocabulary becomes <unk>, logged once."""

    def __init__(self, vocabulary: tuple[str, ...] | list[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self.ids = {word: i for i, word in enumerate((*RESERVED, *self.vocabulary))}
        self.reported: set[str] = set()

    def __call__(self, texts: list[str], length: int) -> Tensor:
        """Ids of `texts`, int32 [P, length], truncated or padded with 0."""
        rows = torch.full((len(texts), length), PADDING, dtype=torch.int32)
        for row, text in zip(rows, texts):
            ids = [self.token(word) for word in re.findall(r"\w+", text.lower())][:length]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        return rows

    def token(self, word: str) -> int:
        if word not in self.ids and word not in self.reported:
            self.reported.add(word)
            logger.warning("the text encoder doesn't know the word %r; it reads as <unk>", word)
        return self.ids.get(word, UNKNOWN)


@cache
def _tokenizer(vocabulary: tuple[str, ...]) -> Tokenizer:
    return Tokenizer(vocabulary)


def tokenize(texts: list[str], length: int, vocabulary: tuple[str, ...] | list[str] | None = None) -> Tensor:
    """Token ids of `texts`, int32 [P, length]; 0 is padding. `vocabulary` defaults to the shipped grammar's."""
    return _tokenizer(default_vocabulary() if vocabulary is None else tuple(vocabulary))(texts, length)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and FFN over one prompt's words; padding is not attended."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [P, E, dim]; bias [P, 1, 1, E] is added to the scores."""
        x = x + self.attention(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))

    def attention(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias
        return self.o((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(-2))


class TextEncoder(nn.Module):
    """A small transformer over word embeddings; rows of padding come out zero."""

    def __init__(self, config: TextEncoderConfig, vocabulary: tuple[str, ...] | list[str] | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = default_vocabulary() if vocabulary is None else tuple(vocabulary)
        self.embedding = nn.Embedding(len(RESERVED) + len(self.vocabulary), config.dim)
        self.position = nn.Parameter(0.02 * torch.randn(config.length, config.dim))
        self.layers = nn.ModuleList(EncoderLayer(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.embedding.weight, std=0.5)

    @property
    def token_count(self) -> int:
        """How many token ids there are."""
        return self.embedding.num_embeddings

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids."""
        return _tokenizer(self.vocabulary)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids of `texts` in this encoder's vocabulary, int32 [P, E]."""
        return self.tokenizer(texts, self.config.length)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int32 [P, E] -> fp32 embeddings [P, E, dim]."""
        word = tokens != PADDING
        bias = (~word).to(torch.float32)[:, None, None, :] * -1e4
        x = functional.embedding(tokens.long(), self.embedding.weight) + self.position
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x).float() * word[..., None].to(torch.float32)


AnyTextEncoder = TextEncoder | UMT5 | GemmaText


def text_encoder_for(
    preset: Preset, vocabulary: Sequence[str] | None = None, checkpoints: Path | None = None
) -> AnyTextEncoder:
    """The text encoder of `preset`, untrained.

    Args:
        vocabulary: words of a "words" encoder; the shipped grammar's if None.
        checkpoints: folder whose tokenizer/tokenizer.json an "umt5" encoder reads, once a text is tokenized.
    """
    if preset.text.kind == "umt5":
        return UMT5(preset.text, None if checkpoints is None else Path(checkpoints) / FOLDER)
    if preset.text.kind == "gemma2":
        return GemmaText(preset.text, checkpoints)
    _require_words(preset)
    return TextEncoder(preset.text, None if vocabulary is None else tuple(vocabulary))


AnyTokenizer = Tokenizer | PieceTokenizer | GemmaTokenizer


def tokenizer_for(preset: Preset, vocabulary: Sequence[str] | None, folder: Path | None) -> AnyTokenizer:
    """What turns texts into the token ids that `preset`'s text encoder reads: (texts, length) -> int32 [P, length].

    Args:
        vocabulary: words of a "words" encoder; the shipped grammar's if None.
        folder: exported networks or checkpoints, whose tokenizer/tokenizer.json an "umt5" encoder's texts go through.

    Raises:
        LongtakeError: the tokenizer's file is missing; says where to put it.
        IntegrityError: the file is damaged or another model's.
    """
    if preset.text.kind == "umt5":
        return PieceTokenizer.open(None if folder is None else Path(folder) / FOLDER, preset.text.vocabulary)
    if preset.text.kind == "gemma2":
        return GemmaTokenizer.open(folder)
    _require_words(preset)
    return _tokenizer(default_vocabulary() if vocabulary is None else tuple(vocabulary))


def _require_words(preset: Preset) -> None:
    if preset.text.kind != "words":
        raise LongtakeError("unknown kind of text encoder", got=preset.text.kind, expected="words, umt5 or gemma2")
