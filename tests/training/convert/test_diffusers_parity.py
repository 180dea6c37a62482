"""Our DiT against diffusers' `WanTransformer3DModel` with the same random weights, in fp32, loaded through convert."""

from __future__ import annotations

import pytest
import torch

from longtake.plugins.cross_attention.reference import dense_cross_attention
from longtake.training.convert.models import convert_dit
from longtake.training.models.checkpoint import copy_state
from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid


def dense(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every token looks at every token: what diffusers computes."""
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(-3, -2) for x in (q, k, v)))
    return out.transpose(-3, -2)


@pytest.mark.parametrize("timesteps", [[937.0] * 3, [0.0, 500.0, 999.0]], ids=["one", "one a frame"])
@torch.no_grad()
def test_velocity_equals_diffusers(preset: Preset, timesteps: list[float]) -> None:
    from diffusers import WanTransformer3DModel

    config = preset.dit
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.head_dim,
        in_channels=config.channels, out_channels=config.channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.layers, eps=config.eps,
    ).eval()  # fmt: skip
    for name, weight in theirs.named_parameters():
        if name.endswith("bias") or "norm" in name:
            weight.add_(torch.randn_like(weight) * 0.2)
    ours = CausalDiT(config).eval()
    copy_state(ours, convert_dit(theirs.state_dict(), preset).state_dict(), "diffusers' weights")

    latents, text = torch.randn(1, config.channels, 3, 4, 6), torch.randn(1, config.text_len, config.text_dim)
    tokens = torch.tensor(timesteps).repeat_interleave(2 * 3)[None]
    expected = theirs(latents, tokens, text, return_dict=False)[0]
    got = ours(
        latents[0], timestep_sinusoid(timesteps, config.freq_dim), rope_tables(config, [0, 1, 2], (2, 3)),
        ours.context(text[0]), dense, dense_cross_attention,
    )  # fmt: skip
    assert expected.std() > 0.1
    assert float((got - expected[0]).abs().max() / expected.abs().max()) <= 1e-5
