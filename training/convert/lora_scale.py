"""What a LoRA's B A is multiplied by, linear by linear: PEFT's rule, and where files say alpha and rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import json_value, read_json
from longtake.tensor_file import tensors_in

Value = TypeVar("Value")

CONFIG = "adapter_config.json"
HEADER = "lora_adapter_metadata"  # diffusers' entry of a safetensors header: PEFT's configuration
ALPHAS = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")  # entries of other headers
RANKS = ("lora_rank", "r", "ss_network_dim", "network_dim", "rank")
# PEFT's settings that make B A, or the weights under it, something else.
OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "fan_in_fan_out": "LoRA of transposed weights",
    "lora_bias": "LoRA with biases",
    "layer_replication": "LoRA of replicated layers",
}
CHANGED_BASES = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LoraScale:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (`root`); 1 where no alpha is said.

    alphas, ranks: of single linears, by PEFT's patterns. factor: instead of all that.
    """

    alpha: float | None = None
    rank: int | None = None
    root: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    factor: float | None = None
    where: str = CONFIG

    def of(self, linear: str, rank: int, alpha: float | None = None) -> float:
        """The factor of `linear`, named as its file does. rank: its tensors'. alpha: stored beside them, if any.

        Raises:
            IntegrityError: its rank is another than what is said.
        """
        if self.factor is not None:
            return self.factor
        said = _matching(self.ranks, linear, self.rank)
        if said is not None and said != rank:
            raise IntegrityError(
                f"the LoRA's {linear} has another rank than {self.where} says",
                got=rank,
                expected=said,
                fix="pass the file and its configuration of one training, or --lora-scale",
            )
        alpha = _matching(self.alphas, linear, self.alpha) if alpha is None else alpha
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)


def stored_scale(path: Path) -> LoraScale:
    """How a LoRA is scaled by the adapter_config.json beside it, its header, or what we wrote beside our own.

    Raises:
        LongtakeError: it doesn't say so, or it is no plain LoRA (named).
    """
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG).is_file():
        return _by_peft(read_json(folder / CONFIG), str(folder / CONFIG))
    files = sorted(folder.glob("*.safetensors")) if path.is_dir() else [path]
    return _by_file(files[0]) if len(files) == 1 else LoraScale()


def _by_file(path: Path) -> LoraScale:
    header = _header(path)
    if HEADER in header:
        try:
            given = json_value(header[HEADER])
        except ValueError:
            raise _unclear(f"the header of {path}") from None
        if isinstance(given, dict):
            given = {key.removeprefix("transformer."): value for key, value in given.items()}
        return _by_peft(given, f"the header of {path}")
    alpha, rank = (next((header[key] for key in keys if _number(header.get(key))), None) for keys in (ALPHAS, RANKS))
    if alpha is not None:
        return LoraScale(float(alpha), None if rank is None else int(float(rank)), where=f"the header of {path}")
    ours = read_json(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else {}
    facts = ours.get("distillation") if isinstance(ours, dict) else None
    facts = facts.get("lora") if isinstance(facts, dict) else None
    if facts is None:
        return LoraScale()
    return _by_peft({"r": facts.get("rank"), "lora_alpha": facts.get("alpha")}, str(path.with_suffix(".json")))


def _by_peft(config: Any, where: str) -> LoraScale:
    """By PEFT's configuration."""
    try:
        kind = str(config.get("peft_type", "LORA"))
        base = str(config.get("init_lora_weights")).lower()
        other = next((name for key, name in OTHER_KINDS.items() if config.get(key)), "" if kind == "LORA" else kind)
        other = other or next(
            (f"LoRA on weights changed by {name}" for name in CHANGED_BASES if base.startswith(name)), ""
        )
        if not other:
            alphas = {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
            alpha, root = float(config["lora_alpha"]), config.get("use_rslora") or False
            if root not in (True, False) or not all(math.isfinite(value) for value in (alpha, *alphas.values())):
                raise ValueError("a word for a switch, or no number")
            return LoraScale(
                alpha,
                int(config["r"]),
                bool(root),
                alphas,
                {key: int(value) for key, value in (config.get("rank_pattern") or {}).items()},
                where=where,
            )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise _unclear(where) from None
    raise not_plain(other, where)


def not_plain(kind: str, got: str) -> LongtakeError:
    """`kind` is something that only its own tool can merge."""
    return LongtakeError(
        f"this is {kind}, not a plain LoRA",
        got=got,
        expected="W + scale B A",
        fix="merge it with the tool that made it, and pass the merged weights with --dit",
    )


def _unclear(where: str) -> LongtakeError:
    return LongtakeError(
        f"{where} doesn't say how a LoRA is scaled", expected="lora_alpha and r", fix="pass --lora-scale"
    )


def _matching(patterns: Mapping[str, Value], linear: str, default: Value | None) -> Value | None:
    """PEFT's `get_pattern_key`."""
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", linear)), default)
    except re.error as error:
        what, got = "a pattern of the LoRA's configuration is no regular expression", error.pattern
        expected, fix = "PEFT's rank_pattern and alpha_pattern", "pass --lora-scale"
        raise LongtakeError(what, got=got, expected=expected, fix=fix) from None


def _header(path: Path) -> dict[str, str]:
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return {}
    try:
        with tensors_in(path) as opened:
            return dict(opened.metadata() or {})
    except IntegrityError:
        return {}  # reading its tensors says what is wrong


def _number(text: str | None) -> bool:
    try:
        return text is not None and 0 < float(text) < math.inf
    except ValueError:
        return False
