"""LoRA by PEFT on exactly the linears that recipes quantize, several adapters on one frozen base.

PEFT's layers are put into the CausalDiT itself, with no model wrapped around it: what is set on the DiT reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.training.models.families import linears_of
from longtake.training.models.quantize import plain_state
from longtake.training.models.wan.dit import CausalDiT


def add_adapters(dit: CausalDiT, names: tuple[str, ...], rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze `dit` and give it an adapter of each name, in place; a new adapter changes nothing yet (B is 0)."""
    if rank < 1 or not alpha > 0:
        what, fix = "bad LoRA", "--lora-rank 128 --lora-alpha 128"
        raise LongtakeError(what, got=f"rank {rank}, alpha {alpha}", expected="rank 1 or more, alpha above 0", fix=fix)
    from peft import LoraConfig, inject_adapter_in_model  # imports transformers, which takes seconds

    targets = linears_of(dit)
    dit.requires_grad_(False)
    device = next(dit.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)  # type: ignore[arg-type]
            inject_adapter_in_model(config, dit, adapter_name=name)
    dit.to(device)
    use_adapter(dit, names[0])


def lora_layers(dit: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of each linear that has adapters."""
    from peft.tuners.lora import LoraLayer

    for name, module in dit.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def use_adapter(dit: nn.Module, name: str | None) -> None:
    """Compute with adapter `name`, or with the base alone. All adapters stay trainable, unlike after PEFT's own switch.

    A recomputed block (gradient checkpointing) takes the adapter of the moment: switch back before the backward pass.
    """
    for _, layer in lora_layers(dit):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter([name])
        for part in (layer.lora_A, layer.lora_B):
            part.requires_grad_(True)


def adapter_parameters(dit: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Adapter `name`'s A [rank, in] and B [out, rank], by PEFT's names: blocks.0.ffn.0.lora_A.weight."""
    return {
        f"{linear}.lora_{side}.weight": getattr(layer, f"lora_{side}")[name].weight
        for linear, layer in lora_layers(dit)
        for side in "AB"
    }


class Adapter(nn.Module):
    """One adapter's parameters as a module of its own, for an optimizer and for resume points."""

    def __init__(self, dit: nn.Module, name: str) -> None:
        super().__init__()
        for key, parameter in adapter_parameters(dit, name).items():
            self.register_parameter(key.replace(".", "/"), parameter)

    def tensors(self) -> dict[str, Tensor]:
        """What a LoRA file holds: PEFT's names, with its prefix."""
        return {f"base_model.model.{key.replace('/', '.')}": value for key, value in self.state_dict().items()}


@torch.no_grad()
def merged(dit: CausalDiT, name: str) -> CausalDiT:
    """A plain DiT with adapter `name` added to the base's weights, W + alpha / rank B A, in fp32 before any rounding."""
    plain = CausalDiT(dit.config).to(device=dit.patch_embedding.weight.device, dtype=dit.dtype)
    plain.load_state_dict(plain_state(dit))
    for linear, layer in lora_layers(dit):
        a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
        weight = plain.get_parameter(f"{linear}.weight")
        weight.copy_(weight.float() + layer.scaling[name] * (b @ a))
    return plain
