"""Our DiT's block math against diffusers' `WanTransformer3DModel`, with the same random weights, in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longtake.plugins.cross_attention.reference import dense_cross_attention
from longtake.training.models.checkpoint import copy_state
from longtake.training.models.presets import DiTConfig
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid

# Sizes that tell every axis apart; head_dim 128 is the release's.
CONFIGS = {
    "head_dim 128": DiTConfig(dim=256, ffn_dim=320, layers=2, heads=2, channels=6, text_dim=24, text_len=7),
    "head_dim 32": DiTConfig(dim=96, ffn_dim=64, layers=3, heads=3, channels=5, text_dim=40, text_len=9),
}
NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    ".scale_shift_table": ".modulation",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_out.0.": ".o.",
    ".to_": ".",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
}


def our_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' weights under our names."""
    ours = {}
    for name, tensor in state.items():
        for theirs, replacement in NAMES.items():
            name = name.replace(theirs, replacement)
        ours[name] = tensor
    return ours


def everything(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the whole sequence, [T, H, D]."""
    return scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_velocity_is_diffusers(config: DiTConfig) -> None:
    """Each latent frame has its own timestep, as in Wan 2.2's text/image-to-video model and in ours."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.head_dim,
        in_channels=config.channels, out_channels=config.channels, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=config.eps, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    for name, weight in theirs.named_parameters():
        if "norm" in name:
            weight.add_(torch.randn_like(weight) * 0.2)  # gains of one and biases of zero would hide a mix-up
    ours = CausalDiT(config).eval()
    copy_state(ours, our_state(theirs.state_dict()), "diffusers' weights")

    frames, grid = 3, (4, 5)
    latents = torch.randn(1, config.channels, frames, 2 * grid[0], 2 * grid[1])
    text = torch.randn(1, config.text_len, config.text_dim)
    times = torch.tensor([0.0, 624.0, 999.0])
    wanted = theirs(latents, times.repeat_interleave(grid[0] * grid[1])[None], text).sample[0]

    got = ours(
        latents[0],
        timestep_sinusoid(times, config.freq_dim),
        rope_tables(config, range(frames), grid),
        ours.context(text[0]),
        everything,
        dense_cross_attention,
    )
    # diffusers evaluates the sinusoid in fp32; at t = 999 its angles are off by 3e-5, which 1e-5 of the velocity allows.
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert wanted.std() > 0.1
