"""Gemma 2 as a text encoder, from a local folder through transformers: the last hidden states of a prompt's positions.

An instruction stands before every prompt. What is kept is the first position, the instruction's last and the prompt's own,
all of which have attended to the whole instruction: as many positions as the preset has.

Legend: N positions that are encoded, E those that are kept, D width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.checked_yaml import read_yaml
from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.record import Kind
from longtake.training.models.preset_parts import TextEncoderConfig

log = logging.getLogger(__name__)

NAME = "gemma.json"  # beside the other checkpoints
KIND = Kind("what tells where Gemma lies", "longtake convert --text", "convert again")
RELEASED = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"  # SHA-256 of the released instruction
PADDING = 0


@dataclass(frozen=True)
class GemmaSource:
    """folder: with Gemma's config.json, tokenizer and weights. instruction: the lines before every prompt."""

    folder: str
    instruction: tuple[str, ...] = ()

    @classmethod
    def find(cls, checkpoints: Path | None) -> GemmaSource:
        """What a folder of checkpoints says. Raises LongtakeError if it says nothing, or Gemma is not there."""
        path = None if checkpoints is None else Path(checkpoints) / NAME
        if path is None or not path.is_file():
            raise LongtakeError(
                "the text encoder, Gemma 2, is not known here",
                got=f"no {path or NAME}",
                expected="where its folder lies",
                fix="longtake convert --text GEMMA_FOLDER --instruction CONFIG.yaml --out CHECKPOINTS, or pass embeddings",
            )
        source = KIND.read(cls, path)
        if not (Path(source.folder) / "config.json").is_file():
            what, got = f"Gemma is not where {path} says", source.folder
            expected, fix = "a folder with config.json", KIND.remake
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
        return source

    @property
    def text(self) -> str:
        """The instruction as it stands before a prompt."""
        return "\n".join(self.instruction)


def instruction_from_config(path: Path) -> tuple[str, ...]:
    """The instruction's lines in a released configuration: its text_encoder.chi_prompt.

    Raises:
        LongtakeError: it has none.
    """
    see = "pass the configuration that the weights were released with"
    given = read_yaml(path, "configuration", "a released YAML configuration", see)
    about = given.get("text_encoder") if isinstance(given, dict) else None
    lines = about.get("chi_prompt") if isinstance(about, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise LongtakeError(
            f"{path} has no instruction", got="no list text_encoder.chi_prompt", expected="lines of text", fix=see
        )
    if hashlib.sha256("\n".join(lines).encode()).hexdigest() != RELEASED:
        log.warning("the instruction in %s is not the one that SANA-WM was released with", path)
    return tuple(lines)


class GemmaText(nn.Module):
    """In the place of a text encoder's module: Gemma's weights are not among the checkpoints. See `gemma_runner`."""

    vocabulary: tuple[str, ...] = ()

    def __init__(self, config: TextEncoderConfig, checkpoints: Path | None = None) -> None:
        super().__init__()
        self.config, self.checkpoints = config, checkpoints

    @property
    def tokenizer(self) -> GemmaTokenizer:
        """Texts to token ids."""
        return GemmaTokenizer.open(self.checkpoints)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids of `texts`, int32 [P, N]."""
        return self.tokenizer(texts, self.config.length)

    def forward(self, tokens: Tensor) -> Tensor:
        raise LongtakeError("Gemma runs through transformers", got="a call of its module", fix="use text_runner_for")


class GemmaTokenizer:
    """(texts, E) -> token ids int32 [P, N] of instruction and text, padded on the right with 0."""

    def __init__(self, tokenizer: Any, instruction: str) -> None:
        self.tokenizer, self.instruction = tokenizer, instruction

    @classmethod
    def open(cls, checkpoints: Path | None) -> GemmaTokenizer:
        """From a folder of checkpoints, see `GemmaSource`."""
        source = GemmaSource.find(checkpoints)
        return cls(_transformers().AutoTokenizer.from_pretrained(source.folder, local_files_only=True), source.text)

    def __call__(self, texts: list[str], length: int) -> Tensor:
        most = length
        if self.instruction:
            most = len(self.tokenizer.encode(self.instruction)) + length - 2
        encoded = self.tokenizer(
            [self.instruction + text for text in texts],
            max_length=most,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        tokens = torch.where(encoded.attention_mask > 0, encoded.input_ids, PADDING)
        return tokens.to(torch.int32)


def kept_positions(encoded: int, kept: int) -> list[int]:
    """Of so many positions: the first, and the last ones."""
    return [0, *range(encoded - kept + 1, encoded)]


def gemma_runner(
    config: TextEncoderConfig, checkpoints: Path | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """tokens int32 [P, N] -> embeddings fp32 [P, E, D], rows of padding zero.

    Raises:
        LongtakeError: Gemma is not there. IntegrityError: it is another model.
    """
    source = GemmaSource.find(checkpoints)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = (
        _transformers().AutoModel.from_pretrained(source.folder, local_files_only=True, dtype=dtype).to(device).eval()
    )
    if model.config.hidden_size != config.dim or model.config.vocab_size != config.vocabulary:
        raise IntegrityError(
            f"{source.folder} holds another text encoder",
            got=f"width {model.config.hidden_size}, {model.config.vocab_size} tokens",
            expected=f"width {config.dim}, {config.vocabulary} tokens",
            fix="pass the Gemma that the preset names",
        )

    @torch.no_grad()
    def encode(tokens: Tensor) -> Tensor:
        ids = tokens.to(device).long()
        mask = ids != PADDING
        states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        at = kept_positions(ids.shape[1], config.length)
        return states[:, at].float() * mask[:, at, None].float()

    return encode


@cache
def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UnavailableError(
            "Gemma runs through transformers", got="not installed", fix="pip install transformers"
        ) from None
    return transformers
