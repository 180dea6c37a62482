"""Which linears of the DiT recipes quantize."""

from __future__ import annotations

from torch import nn

Amax = dict[str, dict[str, float]]


def quantized_linears(dit: nn.Module) -> list[str]:
    """Names of the linears that recipes quantize: blocks.N.{self_attn,cross_attn}.{q,k,v,o}, blocks.N.ffn.{0,2}."""
    layers = len(dit.blocks)  # type: ignore[arg-type]
    own = [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    return [f"blocks.{i}.{name}" for i in range(layers) for name in own]
