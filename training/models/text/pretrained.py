"""A pretrained text encoder from a local folder, frozen: any T5 or sentence encoder that transformers can read.

Presets of kind "pretrained" have it. Its weights become text_encoder.safetensors as every checkpoint's; what describes it
(config.json, tokenizer.json) goes into the folder tokenizer/ beside that file. Nothing is ever fetched, and no code of the
folder is run. Like umT5 it is not exported: PyTorch encodes a prompt once.

Legend: P prompts, E tokens of a prompt (padded).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import read_json
from longtake.training.models.presets import TextEncoderConfig
from longtake.training.models.text.sentencepiece import FILE, FOLDER, copy_changed, shortened

logger = logging.getLogger(__name__)

CONFIG = "config.json"
FILES = (FILE, CONFIG)  # of an encoder's folder, beside its weights
EXPECTED = f"{CONFIG}, {FILE} and model.safetensors, as transformers' save_pretrained writes them"


class PretrainedTokenizer:
    """Texts to the encoder's ids, one higher than in its file, so that 0 is padding for every encoder."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        if not path.is_file():
            what, got = "the text encoder's tokenizer is missing", f"no {path}"
            expected, fix = EXPECTED, f"copy the encoder's {FILE} to {path}"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
        try:
            self.file = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain exceptions, whatever the file holds
            raise IntegrityError(
                f"{path} is not a tokenizer",
                got=str(error)[:120],
                expected=f"transformers' {FILE}",
                fix="copy the file again",
            ) from None
        self.file.no_padding()

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """Ids of `texts`, int32 [P, length]; 0 is padding, and what begins and ends a text stays when it is cut."""
        self.file.enable_truncation(length)
        rows, cut = torch.zeros(len(texts), length, dtype=torch.int32), 0
        for row, text in zip(rows, texts):
            found = self.file.encode(shortened(text, length))
            cut += bool(found.overflowing)
            row[: len(found.ids)] = torch.tensor(found.ids, dtype=torch.int32) + 1
        if cut:
            logger.warning(
                "%d of %d prompts are cut to the %d tokens that the text encoder reads", cut, len(rows), length
            )
        return rows


@cache
def pretrained_tokenizer(folder: Path) -> PretrainedTokenizer:
    """The tokenizer in `folder`, read once a process."""
    return PretrainedTokenizer(folder / FILE)


class PretrainedText(nn.Module):
    """The encoder of a folder. Without a folder it has no weights and encodes nothing: graphs do not hold it.

    Args:
        described: folder with config.json and tokenizer.json.
    """

    vocabulary: tuple[str, ...] = ()  # the tokenizer's file has it

    def __init__(self, config: TextEncoderConfig, described: Path | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer_folder = config, described
        self.encoder: Any = None if described is None else empty_encoder(described, config)
        self.eval()

    def train(self, mode: bool = True) -> PretrainedText:
        """It never learns, and its dropout stays off."""
        return super().train(False)

    @property
    def tokenizer(self) -> PretrainedTokenizer:
        """Texts to token ids. Raises LongtakeError if its file is missing."""
        return pretrained_tokenizer(self._folder())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids of `texts`, int32 [P, E]; 0 is padding."""
        return self.tokenizer(texts, self.config.length)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int32 [P, E] -> fp32 embeddings [P, E, dim]; rows of padding are zero."""
        self._folder()
        words = tokens != 0
        ids, mask = (tokens.long() - 1).clamp(min=0), words.long()
        found: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return found.float().masked_fill(~words[..., None], 0.0)

    def _folder(self) -> Path:
        if self.tokenizer_folder is None:
            raise LongtakeError(
                "this preset reads a pretrained text encoder, and there is none",
                expected=EXPECTED,
                fix="pass its folder: longtake train --stage dit --text-encoder FOLDER",
            )
        return self.tokenizer_folder


def empty_encoder(folder: Path, config: TextEncoderConfig) -> nn.Module:
    """The encoder that config.json in `folder` describes, without its weights.

    Raises:
        LongtakeError: there is none, or it does not fit the preset.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    told = _described(folder)
    _require_fit(folder, told, config)
    found = AutoConfig.for_model(**told)
    kind = AutoModelForTextEncoding if type(found) in AutoModelForTextEncoding._model_mapping else AutoModel
    with torch.device("cpu"):  # tables that are no weights are computed here, whatever the device around
        model: Any = kind.from_config(found)
    return model.get_encoder() if getattr(found, "is_encoder_decoder", False) else model  # type: ignore[no-any-return]


def pretrained_text(config: TextEncoderConfig, folder: Path) -> PretrainedText:
    """The encoder in a folder of transformers', with its weights.

    Raises:
        LongtakeError: the folder lacks a file, or the encoder does not fit the preset.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing or not list(folder.glob("*.safetensors")):
        what, got = f"{folder} holds no text encoder", f"no {', '.join(missing) or '*.safetensors'}"
        expected, fix = EXPECTED, "check --text-encoder"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    text = PretrainedText(config, folder)
    known = type(AutoConfig.for_model(**_described(folder))) in AutoModelForTextEncoding._model_mapping
    kind = AutoModelForTextEncoding if known else AutoModel
    try:
        loaded: Any = kind.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(
            f"the text encoder in {folder} cannot be read",
            got=str(error)[:200],
            expected=EXPECTED,
            fix="copy the folder again",
        ) from None
    source = loaded.get_encoder() if getattr(loaded.config, "is_encoder_decoder", False) else loaded
    text.encoder.load_state_dict(source.state_dict())
    return text.requires_grad_(False).eval()


def preset_lines(folder: Path) -> str:
    """What a preset file says for the encoder in `folder`."""
    told = _described(folder)
    size = told.get("hidden_size") or told.get("d_model") or told.get("dim")
    return f"base: tiny\ndit: {{text_dim: {size}}}\ntext: {{kind: pretrained, dim: {size}}}"


def _described(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise LongtakeError(
            f"{folder} holds no text encoder", got=f"no {CONFIG}", expected=EXPECTED, fix="check --text-encoder"
        )
    told = read_json(folder / CONFIG)
    if not isinstance(told, dict) or "model_type" not in told:
        raise IntegrityError(f"{folder / CONFIG} describes no model", got="no model_type", expected=EXPECTED)
    from transformers import CONFIG_MAPPING

    if told["model_type"] not in CONFIG_MAPPING:
        raise LongtakeError(
            f"the text encoder in {folder} is of a kind that transformers does not know",
            got=told["model_type"],
            expected="t5, bert, mpnet, roberta, xlm-roberta or the like",
        )
    return told


def _require_fit(folder: Path, told: dict[str, Any], config: TextEncoderConfig) -> None:
    size = told.get("hidden_size") or told.get("d_model") or told.get("dim")
    room = told.get("max_position_embeddings", config.length)
    if size != config.dim or config.length > room:
        raise LongtakeError(
            "the text encoder does not fit the preset",
            got=f"width {size}, at most {room} tokens",
            expected=f"width {config.dim}, {config.length} tokens",
            fix="use a preset file that says\n" + preset_lines(folder),
        )


def carry_description(source: Path, folder: Path) -> None:
    """Copy what describes an encoder, but for its weights, from `source` to where a folder of checkpoints has it."""
    for name in FILES:
        if (source / name).is_file():
            copy_changed(source / name, folder / FOLDER / name)
