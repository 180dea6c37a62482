"""LoRA in PEFT's keys, merged into the weights it was trained on: W + scale * B A, in fp32, before any quantization."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from longtake.errors import IntegrityError
from longtake.training.convert.dit_keys import wan_name
from longtake.training.convert.fit import some
from longtake.training.convert.pending import Pending

_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_PREFIX = re.compile(
    r"^(?:base_model\.model\.|_fsdp_wrapped_module\.|module\.|diffusion_model\.|transformer\.|model\.)+"
)


def pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Linear name -> (A [rank, in], B [out, rank]).

    Raises:
        IntegrityError: a key isn't a LoRA's, or a pair is not whole.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        if found := _KEY.fullmatch(key.replace("_fsdp_wrapped_module.", "")):
            halves.setdefault(_linear(found[1]), {})[found[2]] = tensor
        else:
            unknown.append(key)
    if unknown or not halves:
        raise IntegrityError("this is not a LoRA", got=some(sorted(unknown)) or "no keys", fix="pass PEFT's LoRA file",
                             expected="blocks.N.self_attn.q.lora_A.weight and ...lora_B.weight")  # fmt: skip
    alone = sorted(f"{name} (only lora_{next(iter(half))})" for name, half in halves.items() if len(half) < 2)
    if alone:
        raise IntegrityError(f"{len(alone)} LoRA pairs are not whole", got=some(alone), expected="lora_A and lora_B of each",
                             fix="get the file again")  # fmt: skip
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def merge(
    tensors: Mapping[str, Pending], lora: Mapping[str, Tensor], scale: float
) -> tuple[dict[str, Pending], list[str]]:
    """`tensors` with the LoRA added to the weights it names, and those linears' names.

    Raises:
        IntegrityError: a pair names no linear of the model, or doesn't fit its weight.
    """
    merged, found = dict(tensors), pairs(lora)
    strangers = sorted(name for name in found if f"{name}.weight" not in tensors)
    if strangers:
        raise IntegrityError(f"the LoRA has {len(strangers)} linears that the model lacks", got=some(strangers),
                             expected="blocks.N.{self_attn,cross_attn}.{q,k,v,o}, blocks.N.ffn.{0,2}",
                             fix="pass the LoRA of this model")  # fmt: skip
    for name, (a, b) in found.items():
        weight = tensors[f"{name}.weight"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise IntegrityError(f"the LoRA doesn't fit {name}", got=f"A {list(a.shape)}, B {list(b.shape)}",
                                 expected=f"A [rank, {weight.shape[1]}], B [{weight.shape[0]}, rank]",
                                 fix="pass the LoRA of this model")  # fmt: skip
        merged[f"{name}.weight"] = _sum(weight, a, b, scale)
    return merged, sorted(found)


def _linear(name: str) -> str:
    return wan_name(_PREFIX.sub("", name) + ".")[:-1]  # Wan's names stay as they are


def _sum(weight: Pending, a: Tensor, b: Tensor, scale: float) -> Pending:
    def make() -> Tensor:
        return weight.make().float() + scale * (b.float() @ a.float())

    return Pending(weight.shape, torch.float32, make)
