"""LoRA merged into the weights it was trained on: W + scale * B A, in fp32, before any quantization.

Read are PEFT's keys (`base_model.model.X.lora_A.weight`), kohya's (`lora_unet_X.lora_down.weight`, dots of X written as
underscores, with `.alpha`) and ComfyUI's (`diffusion_model.X.lora_A.weight`); X is Wan's name, or diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.errors import IntegrityError, some
from longtake.training.convert.dit_keys import wan_name
from longtake.training.convert.lora_scale import LoraScale, not_plain
from longtake.training.convert.pending import Pending

_KEY = re.compile(r"(.+)\.(?:lora_(A|B)|lora[_.](down|up))(?:\.\w+)?\.weight")
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_ALPHA = re.compile(r"(.+)\.alpha")
_PREFIX = re.compile(
    r"^(?:base_model\.model\.|_fsdp_wrapped_module\.|module\.|diffusion_model\.|transformer\.|model\.)+"
)
_KOHYA = re.compile(r"lora_(?:unet|transformer)_")
_OTHERS = {
    "DoRA": r"\.lora_magnitude_vector|\.dora_scale$", "LoHa": r"\.hada_", "LoKr": r"\.lokr_", "OFT": r"\.oft_",
    "(IA)3": r"\.ia3_|\.on_input$", "LoCon with a core": r"\.lora_mid\.", "a LoRA with biases": r"\.lora_B\b.*\.bias$",
    "a LoRA with full differences": r"\.diff(_b)?$",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A [rank, in] and B [out, rank] of a linear, its alpha if stored beside them, and its name in the file."""

    a: Tensor
    b: Tensor
    alpha: float | None
    stored: str


def pairs(state: Mapping[str, Tensor], linears: Collection[str] = ()) -> dict[str, Pair]:
    """Linear name -> its pair. linears: the model's, which kohya's names are looked up in.

    Raises:
        LongtakeError: it is DoRA, LoHa or another kind that isn't W + scale B A.
        IntegrityError: a key isn't a LoRA's or is there twice, or a pair is not whole.
    """
    underscored = {name.replace(".", "_"): name for name in linears}
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    stored: dict[str, str] = {}
    unknown, twice = [], []
    for key, tensor in state.items():
        plain = key.replace("_fsdp_wrapped_module.", "")
        if found := _KEY.fullmatch(plain):
            name, side = _linear(found[1], underscored), _SIDES[found[2] or found[3]]
            twice += [key] if side in halves.setdefault(name, {}) else []
            halves[name][side], stored[name] = tensor, found[1].removeprefix("base_model.model.")
        elif found := _ALPHA.fullmatch(plain):
            name = _linear(found[1], underscored)
            twice += [key] if name in alphas else []
            alphas[name] = _alpha(key, tensor)
        else:
            unknown.append(key)
    for kind, pattern in _OTHERS.items():
        if of_kind := sorted(key for key in unknown if re.search(pattern, key)):
            raise not_plain(kind, some(of_kind))
    if unknown or not halves:
        fix, expected = "pass PEFT's LoRA file", "blocks.N.self_attn.q.lora_A.weight and ...lora_B.weight"
        raise IntegrityError("this is not a LoRA", got=some(sorted(unknown)) or "no keys", fix=fix, expected=expected)
    if twice:
        what = "the LoRA has linears twice"
        raise IntegrityError(what, got=some(sorted(twice)), expected="one adapter", fix="pass a file with one adapter")
    alone = sorted(f"{name} (only lora_{next(iter(half))})" for name, half in halves.items() if len(half) < 2)
    alone += sorted(f"{name} (only alpha)" for name in alphas.keys() - halves.keys())
    if alone:
        what = f"{len(alone)} LoRA pairs are not whole"
        raise IntegrityError(what, got=some(alone), expected="lora_A and lora_B of each", fix="get the file again")
    return {name: Pair(half["A"], half["B"], alphas.get(name), stored[name]) for name, half in halves.items()}


def merge(
    tensors: Mapping[str, Pending], lora: Mapping[str, Tensor], scale: LoraScale
) -> tuple[dict[str, Pending], dict[str, float]]:
    """`tensors` with the LoRA added to the weights it names, and those linears' names with their factors.

    Raises:
        IntegrityError: a pair names no linear of the model, or doesn't fit its weight or its stated rank.
    """
    linears = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    merged, factors, found = dict(tensors), {}, pairs(lora, linears)
    strangers = sorted(name for name in found if f"{name}.weight" not in tensors)
    if strangers:
        what = f"the LoRA has {len(strangers)} linears that the model lacks"
        expected = "blocks.N.{self_attn,cross_attn}.{q,k,v,o}, blocks.N.ffn.{0,2}"
        raise IntegrityError(what, got=some(strangers), expected=expected, fix="pass the LoRA of this model")
    for name, pair in found.items():
        a, b, weight = pair.a, pair.b, tensors[f"{name}.weight"]
        fits = (
            a.ndim == b.ndim == 2 and 0 < a.shape[0] == b.shape[1] and (b.shape[0], a.shape[1]) == tuple(weight.shape)
        )
        if not fits:
            what = f"the LoRA doesn't fit {name}"
            expected, fix = f"A [rank, {weight.shape[1]}], B [{weight.shape[0]}, rank]", "pass the LoRA of this model"
            raise IntegrityError(what, got=f"A {list(a.shape)}, B {list(b.shape)}", expected=expected, fix=fix)
        factors[name] = scale.of(pair.stored, a.shape[0], pair.alpha)
        merged[f"{name}.weight"] = _sum(weight, a, b, factors[name])
    return merged, factors


def _alpha(key: str, tensor: Tensor) -> float:
    """A stored alpha. Raises IntegrityError unless it is one positive number: nothing, or NaN, would be merged."""
    values = tensor.float().reshape(-1).tolist() if tensor.numel() == 1 else []
    if values and 0 < values[0] < float("inf"):
        return float(values[0])
    got = values[0] if values else f"a tensor {list(tensor.shape)}"
    raise IntegrityError(
        f"the LoRA's {key} is no alpha", got=got, expected="one positive number", fix="get the file again"
    )


def _linear(name: str, underscored: Mapping[str, str]) -> str:
    if kohya := _KOHYA.match(name):
        return underscored.get(name[kohya.end() :], name)
    return wan_name(_PREFIX.sub("", name) + ".")[:-1]  # Wan's names stay as they are


def _sum(weight: Pending, a: Tensor, b: Tensor, scale: float) -> Pending:
    def make() -> Tensor:
        return weight.make().float() + scale * (b.float() @ a.float())

    return Pending(weight.shape, torch.float32, make)
