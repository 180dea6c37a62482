"""Which linears of the DiT recipes quantize. The camera branch, its maps and the temporal convolution are left as they are:
they carry small signals, and quantized the video no longer follows its cameras."""

from __future__ import annotations

from torch import nn

QUANTIZED = (
    "attn.qkv",
    "attn.proj",
    "attn.output_gate",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "mlp.inverted_conv.conv",
    "mlp.point_conv.conv",
)


def quantized_linears(dit: nn.Module) -> list[str]:
    """Their names: blocks.N.NAME."""
    layers = len(dit.blocks)  # type: ignore[arg-type]
    return [f"blocks.{i}.{name}" for i in range(layers) for name in QUANTIZED]
