"""umT5's tokenizer: SentencePiece pieces from a local tokenizer.json, and the cleaning of prompts that goes before it.

The file is Hugging Face's for google/umt5-xxl; nothing is ever fetched.
"""

from __future__ import annotations

import html
import logging
import re
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import atomic_path, sha256

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

FOLDER, FILE, SENTENCEPIECE = "tokenizer", "tokenizer.json", "spiece.model"
PLACES = (FOLDER, "google/umt5-xxl", ".")  # in a model's folder: ours and diffusers', Wan's, the tokenizer's own
PAD, END = "<pad>", "</s>"
# A piece has 16 characters at most unless it was trained otherwise: eight times that can't end before the last token.
CHARACTERS_PER_TOKEN = 128


def clean(text: str) -> str:
    """`text` as Wan and LongLive clean prompts: ftfy, HTML entities resolved twice, runs of white space to one space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def shortened(text: str, length: int) -> str:
    """`text`, cut (with a warning) where far more characters follow than `length` tokens can hold."""
    limit = CHARACTERS_PER_TOKEN * length
    if len(text) <= limit:
        return text
    logger.warning("a prompt of %d characters is cut to %d: the text encoder reads %d tokens", len(text), limit, length)
    return " ".join(text[: 16 * limit].split())[:limit]


class PieceTokenizer:
    """Texts to ids of pieces, with the end token, truncated and padded as the model was trained."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        """Read `path`; its ids must fit `vocabulary` embedding rows.

        Raises:
            LongtakeError: there is no such file.
            IntegrityError: it is no tokenizer, has no <pad> with id 0 or no </s>, or more pieces than the embedding.
        """
        if not path.is_file():
            raise _missing(path)
        self.path = path
        self.pieces = _read(path)
        self._check(vocabulary)

    @classmethod
    def open(cls, folder: Path | None, vocabulary: int) -> PieceTokenizer:
        """The tokenizer in `folder`, read once a process."""
        if folder is None:
            what, expected = "the text encoder was made without a tokenizer", "a folder with tokenizer.json"
            raise LongtakeError(what, expected=expected, fix="pass the folder to text_encoder_for or tokenizer_for")
        return _opened(Path(folder) / FILE, vocabulary)

    def __call__(self, texts: list[str], length: int) -> Tensor:
        """Ids of `texts`, int32 [P, length]; 0 is padding, and every text ends with </s>."""
        rows = torch.zeros(len(texts), length, dtype=torch.int32)
        for row, text in zip(rows, texts):
            ids = self.ids(clean(shortened(text, length)))
            if len(ids) > length:
                logger.warning("a prompt of %d tokens is cut to the %d that the text encoder reads", len(ids), length)
                ids = [*ids[: length - 1], self.end]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        return rows

    def ids(self, text: str) -> list[int]:
        """All ids of one cleaned text, </s> last."""
        ids: list[int] = self.pieces.encode(text).ids
        return ids if self.appends_end else [*ids, self.end]

    def _check(self, vocabulary: int) -> None:
        pad, end = self.pieces.token_to_id(PAD), self.pieces.token_to_id(END)
        size = self.pieces.get_vocab_size()
        if pad != 0 or end is None or size > vocabulary:
            what = f"{self.path} is not umT5's tokenizer"
            got, fix = f"{size} pieces, {PAD} {pad}, {END} {end}", "use the file of google/umt5-xxl"
            raise IntegrityError(what, got=got, expected=f"at most {vocabulary} pieces, {PAD} 0 and an {END}", fix=fix)
        self.end: int = end
        self.appends_end = self.pieces.encode("").ids == [end]


def carry_tokenizer(source: Path, folder: Path) -> Path | None:
    """Copy the tokenizer's file of a model folder to where `PieceTokenizer.open(folder / FOLDER, ...)` finds it.

    `source` may be a converted checkpoint, or as Wan or diffusers lay theirs out. Where none is found a warning says
    where to put it, and None is returned: encoding texts is the only thing that needs it.
    """
    target = folder / FOLDER / FILE
    found = next((path for place in PLACES if (path := source / place / FILE).is_file()), None)
    if found is None:
        if not target.is_file():
            logger.warning("%s", _missing(target))
        return None
    copy_changed(found, target)
    return target


def copy_changed(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all, unless its content lies there already."""
    if not target.is_file() or sha256(target) != sha256(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial:
            shutil.copyfile(source, partial)


def _missing(path: Path) -> LongtakeError:
    fix = f"copy google/umt5-xxl/tokenizer.json of Wan2.2-TI2V-5B (or tokenizer/tokenizer.json of its diffusers form) to {path}"
    if (path.parent / SENTENCEPIECE).is_file():
        fix += (f"; or make it from {SENTENCEPIECE}, with transformers and sentencepiece installed: T5Tokenizer"
                f".from_pretrained({str(path.parent)!r}, extra_ids=0).save_pretrained({str(path.parent)!r})")  # fmt: skip
    what = "the text encoder's tokenizer is missing"
    return LongtakeError(what, got=f"no {path}", expected="the tokenizer.json of google/umt5-xxl", fix=fix)


def _read(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        pieces = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself, whatever the file holds
        what, expected = f"{path} is not a tokenizer", "Hugging Face's tokenizer.json"
        raise IntegrityError(what, got=str(error)[:120], expected=expected, fix="copy the file again") from None
    pieces.no_padding()
    pieces.no_truncation()
    return pieces


@cache
def _opened(path: Path, vocabulary: int) -> PieceTokenizer:
    return PieceTokenizer(path, vocabulary)
