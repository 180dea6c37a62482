"""Word tokenizer and the small trainable text encoder; presets of kind "umt5" have umT5 behind the same interface.

Legend: P prompts, E tokens of a prompt (padded), V vocabulary.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.errors import LongtakeError
from longtake.training.models.presets import TEXT_KINDS, Preset, TextEncoderConfig
from longtake.training.models.text.gemma import GemmaText, GemmaTokenizer
from longtake.training.models.text.pretrained import PretrainedText, PretrainedTokenizer, pretrained_tokenizer
from longtake.training.models.text.room_grammar import room_words
from longtake.training.models.text.sentencepiece import FOLDER, PieceTokenizer
from longtake.training.models.text.umt5 import UMT5

logger = logging.getLogger(__name__)

PADDING, UNKNOWN = 0, 1
RESERVED = ("<pad>", "<unk>")
WORDS_NAMED = 6  # in a message
INSIDE = "##"  # begins a piece that goes on a word
# Scripts that are written without spaces: every character is a word.
UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@cache
def default_vocabulary() -> tuple[str, ...]:
    """Lower-case words of the shipped data sets' caption grammar, in token order after RESERVED."""
    from longtake.training.models.text.grammar import caption_words

    return tuple(sorted(set(caption_words())))


def words_of(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation; a sign such as an emoji is a word."""
    text = unicodedata.normalize("NFC", text).lower()
    if text.isascii():
        return re.findall(r"\w+", text)
    return "".join(map(_spaced, text)).split()


def _spaced(sign: str) -> str:
    kind = unicodedata.category(sign)
    if kind == "So" or any(first <= ord(sign) <= last for first, last in UNSPACED):
        return f" {sign} "
    return sign if sign.isalnum() or sign == "_" or kind[0] == "M" else " "


def tokens_of(word: str, ids: Mapping[str, int], longest: int) -> list[int] | None:
    """The tokens of one word: itself, else its longest pieces from the left; None if there are none.

    longest: characters of the longest of `ids`, so that a word of thousands costs no more than a text of thousands.
    """
    if word in ids:
        return [ids[word]]
    found: list[int] = []
    start = 0
    while start < len(word):
        ends = range(min(len(word), start + longest), start, -1)
        pieces = (((INSIDE if start else "") + word[start:end], end) for end in ends)
        piece, start = next((pair for pair in pieces if pair[0] in ids), ("", 0))
        if not piece:
            return None
        found.append(ids[piece])
    return found


def vocabulary_of(preset: Preset) -> tuple[str, ...]:
    """The words of the captions of the shipped data set that a preset's videos are like."""
    return room_words() if preset.family == "sana_wm" else default_vocabulary()


class Tokenizer:
    """Texts to ids of words, or of pieces where the vocabulary has any; a word that it lacks reads as <unk>.

    Unknown words are logged, once each, with their share; texts of which most is unknown are refused.
    """

    def __init__(self, vocabulary: tuple[str, ...] | list[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self.ids = {word: i for i, word in enumerate((*RESERVED, *self.vocabulary))}
        self.longest = max(map(len, self.ids))
        self.reported: set[str] = set()
        self.refuses = True

    @contextmanager
    def taking_all(self) -> Iterator[None]:
        """Inside, unknown words are said, but never refused: held-out captions may have words of their own."""
        self.refuses = False
        try:
            yield
        finally:
            self.refuses = True

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """Ids of `texts`, int32 [P, length], truncated or padded with 0.

        Raises:
            LongtakeError: most of their words are unknown.
        """
        self.check(texts)
        rows, cut = torch.full((len(texts), length), PADDING, dtype=torch.int32), 0
        for row, text in zip(rows, texts):
            ids = [token for word in words_of(text) for token in self.tokens(word) or [UNKNOWN]]
            cut += len(ids) > length
            row[: min(len(ids), length)] = torch.tensor(ids[:length], dtype=torch.int32)
        if cut:
            logger.warning(
                "%d of %d prompts are cut to the %d tokens that the text encoder reads", cut, len(rows), length
            )
        return rows

    def tokens(self, word: str) -> list[int] | None:
        """The tokens of a word; None if it is unknown."""
        return tokens_of(word, self.ids, self.longest)

    def check(self, texts: Sequence[str]) -> None:
        """Say which words are unknown, if that was not said before. Raises LongtakeError if most are."""
        words = [word for text in texts for word in words_of(text)]
        unknown = Counter(word for word in words if word not in self.ids and self.tokens(word) is None)
        count = sum(unknown.values())
        named = [word for word, _ in unknown.most_common(WORDS_NAMED)]
        told = ", ".join(map(repr, named)) + (
            f" and {len(unknown) - len(named)} more" if len(unknown) > len(named) else ""
        )
        if self.refuses and 2 * count > len(words):
            raise LongtakeError(
                "the text encoder does not know most of these words",
                got=f"{count} of {len(words)} unknown: {told}",
                expected=f"words that it was trained with, such as {', '.join(self.vocabulary[:WORDS_NAMED]) or 'none'}",
                fix="use those, or train it on captions with these words: longtake train --stage dit --data CLIPS "
                "--init FOLDER",
            )
        if unknown.keys() - self.reported:
            self.reported |= unknown.keys()
            logger.warning(
                "the text encoder doesn't know %d of %d words (%.0f %%), which read as <unk>: %s",
                count,
                len(words),
                100 * count / len(words),
                told,
            )


@cache
def word_tokenizer(vocabulary: tuple[str, ...]) -> Tokenizer:
    return Tokenizer(vocabulary)


def tokenize(texts: list[str], length: int, vocabulary: tuple[str, ...] | list[str] | None = None) -> Tensor:
    """Token ids of `texts`, int32 [P, length]; 0 is padding. `vocabulary` defaults to the shipped grammar's."""
    return word_tokenizer(default_vocabulary() if vocabulary is None else tuple(vocabulary))(texts, length)


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
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids."""
        return word_tokenizer(self.vocabulary)

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


class TextStep(nn.Module):
    """Network "text_encoder": tokens int32 [1, E] -> embeddings fp32 [1, E, text_dim]."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.text(tokens),)


AnyTextEncoder = TextEncoder | UMT5 | PretrainedText | GemmaText
AnyTokenizer = Tokenizer | PieceTokenizer | PretrainedTokenizer | GemmaTokenizer


def text_encoder_for(
    preset: Preset, vocabulary: Sequence[str] | None = None, checkpoints: Path | None = None
) -> AnyTextEncoder:
    """The text encoder of `preset`, untrained.

    Args:
        vocabulary: words of a "words" encoder; the shipped grammar's if None.
        checkpoints: folder whose tokenizer/tokenizer.json an "umt5" or "pretrained" encoder reads.
    """
    if preset.text.kind == "umt5":
        return UMT5(preset.text, None if checkpoints is None else Path(checkpoints) / FOLDER)
    if preset.text.kind == "gemma2":
        return GemmaText(preset.text, checkpoints)
    if preset.text.kind == "pretrained":
        return PretrainedText(preset.text, None if checkpoints is None else Path(checkpoints) / FOLDER)
    _require_words(preset)
    return TextEncoder(preset.text, vocabulary_of(preset) if vocabulary is None else tuple(vocabulary))


def tokenizer_for(preset: Preset, vocabulary: Sequence[str] | None, folder: Path | None) -> AnyTokenizer:
    """What turns texts into the token ids that `preset`'s text encoder reads: (texts, length) -> int32 [P, length].

    Args:
        vocabulary: words of a "words" encoder; the shipped grammar's if None.
        folder: exported networks or checkpoints, whose tokenizer/tokenizer.json an "umt5" or "pretrained" encoder's texts go through.

    Raises:
        LongtakeError: the tokenizer's file is missing; says where to put it.
        IntegrityError: the file is damaged or another model's.
    """
    if preset.text.kind == "umt5":
        return PieceTokenizer.open(None if folder is None else Path(folder) / FOLDER, preset.text.vocabulary)
    if preset.text.kind == "gemma2":
        return GemmaTokenizer.open(folder)
    if preset.text.kind == "pretrained":
        return PretrainedText(preset.text).tokenizer if folder is None else pretrained_tokenizer(Path(folder) / FOLDER)
    _require_words(preset)
    return word_tokenizer(vocabulary_of(preset) if vocabulary is None else tuple(vocabulary))


def _require_words(preset: Preset) -> None:
    if preset.text.kind != "words":
        raise LongtakeError("unknown kind of text encoder", got=preset.text.kind, expected=" or ".join(TEXT_KINDS))
