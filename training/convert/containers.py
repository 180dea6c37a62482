"""Which state dict of a LongLive or Wan container is meant, and its keys without what wrappers put in front of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError, some

LEGACY = "longlive_generator_te_nvfp4"
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")  # anywhere in a key
PREFIXES = ("module.", "base_model.model.", "model.diffusion_model.", "diffusion_model.", "model.")  # in front
# Parts of keys that adapters have and weights have not; which of them can be merged, `lora.pairs` says.
ADAPTER = re.compile(r"\.(lora[_.]|alpha$|dora_scale$|hada_|lokr_|oft_|ia3_|on_input$|diff$|diff_b$)")


@dataclass(frozen=True)
class Chosen:
    """A DiT's weights and/or LoRA as a container holds them. name: which entry, "raw" for the whole file."""

    name: str
    weights: dict[str, Tensor]
    lora: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)


def choose(container: Mapping[str, Any], use_ema: bool = False) -> Chosen:
    """The DiT in `container`: generator_ema (if asked for), else generator, model, or the whole of it.

    `lora` is what `generator_lora` holds, or the whole where only LoRA keys are there.

    Raises:
        LongtakeError: EMA weights asked for but not there, or the legacy format of Transformer Engine.
        IntegrityError: an entry isn't a dict of tensors.
    """
    about = {key: container[key] for key in ("checkpoint_format", "quantization", "step") if key in container}
    if about.get("checkpoint_format") == LEGACY:
        raise LongtakeError(
            f"the file is of the legacy format {LEGACY}, which cannot be read without Transformer Engine",
            expected="merged bf16 weights or packed four-over-six weights",
            fix="use model_te.pt (merged bf16) or model_4o6.pt (packed) of a later release",
        )
    if use_ema and "generator_ema" not in container:
        what = "the file has no EMA weights"
        raise LongtakeError(what, got=f"keys {some(container)}", expected='"generator_ema"', fix="leave out --use-ema")
    entries = ["generator_ema"] if use_ema else ["generator", "model", "generator_ema"]
    for name in entries:
        if isinstance(container.get(name), Mapping):
            return Chosen(name, unwrapped(_tensors(name, container[name])), {}, about)
    if isinstance(container.get("generator_lora"), Mapping):
        return Chosen("generator_lora", {}, _tensors("generator_lora", container["generator_lora"]), about)
    raw = _tensors("the file", {key: value for key, value in container.items() if key not in about})
    if raw and all(ADAPTER.search(key) for key in raw):
        return Chosen("raw", {}, raw, about)
    return Chosen("raw", unwrapped(raw), {}, about)


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with plain keys: no wrapper's part in them, no prefix that all of them share."""
    names = {key: _plain(key) for key in state}
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names.values()):
            names = {key: name.removeprefix(prefix) for key, name in names.items()}
    if len(set(names.values())) < len(names):
        twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
        what = "keys are the same once wrappers' prefixes are removed"
        raise IntegrityError(what, got=some(twice), expected="each once", fix="pass a file with one model")
    return {names[key]: value for key, value in state.items()}


def _plain(key: str) -> str:
    for part in WRAPPERS:
        key = key.replace(part, "")
    return key


def _tensors(where: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    other = sorted(str(key) for key, value in entry.items() if not isinstance(value, Tensor))
    if other or not entry:
        what, got = f"{where} is not a state dict", f"{some(other)} not tensors" if other else "no keys"
        expected = 'tensors by name, or "generator", "generator_ema", "model" or "generator_lora"'
        raise IntegrityError(what, got=got, expected=expected, fix="pass a checkpoint of the generator")
    return dict(entry)
