from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longtake.plugins.cross_attention.reference import dense_cross_attention
from longtake.training.models.presets import TINY
from longtake.training.models.text.words import TextEncoder
from longtake.training.models.wan.dit import CausalDiT, segment_cross_attention
from longtake.training.models.wan.linears import quantized_linears
from longtake.training.models.wan.networks import DiTStep
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid
from longtake.training.models.wan.slots import visible_blocks
from longtake.training.models.wan.window import block_mask, full_history, shot_offsets, window_history
from longtake.training.objective.teacher_forcing import (
    Clips,
    Noise,
    block_attention,
    draw_noise,
    flow_loss,
    predict_velocity,
)

PRESET = TINY
CHUNK = PRESET.chunk_latents


def random_dit(seed: int = 0) -> CausalDiT:
    torch.manual_seed(seed)
    dit = CausalDiT(PRESET.dit).eval()
    torch.nn.init.xavier_uniform_(dit.head.head.weight)
    return dit


def random_clips(cuts: list[bool] | None, chunks: int) -> Clips:
    offsets = None if cuts is None else torch.tensor([shot_offsets(cuts, PRESET.shot_rope_offset)])
    return Clips(
        latents=torch.randn(1, chunks * CHUNK, PRESET.dit.channels, *PRESET.latent_hw),
        tokens=torch.zeros(1, chunks, PRESET.dit.text_len, dtype=torch.int32),
        history=full_history(chunks) if cuts is None else window_history(cuts, 4)[None],
        unmasked=chunks if cuts is None else PRESET.window_chunks,
        offsets=offsets,
    )


class CachedRun:
    """Chunk-by-chunk inference through the cache ops, slot = block number, so nothing but the table decides."""

    def __init__(self, dit: CausalDiT, clips: Clips, noise: Noise, embeddings: Tensor) -> None:
        self.step = DiTStep(dit, "bf16")
        self.dit, self.clips, self.noise, self.embeddings = dit, clips, noise, embeddings
        config = PRESET.dit
        shape = (clips.chunks, 2, PRESET.chunk_tokens, config.heads, config.head_dim)
        self.caches = [torch.zeros(shape) for _ in range(config.layers)]

    def run(self, block: int, latents_FCHW: Tensor, timestep: float, seen: list[int], write: int) -> Tensor:
        offset = 0 if self.clips.offsets is None else int(self.clips.offsets[0, block])
        cos, sin = rope_tables(PRESET.dit, [block * CHUNK + offset + i for i in range(CHUNK)], PRESET.grid_hw)
        velocity, *self.caches = self.step(
            latents_FCHW.transpose(0, 1)[None],
            timestep_sinusoid([timestep] * CHUNK, PRESET.dit.freq_dim),
            cos,
            sin,
            torch.tensor([-1 if b == block else b for b in seen], dtype=torch.int32),
            torch.tensor([write], dtype=torch.int32),
            *self.dit.context(self.embeddings[0, block]),
            *self.caches,
        )
        return velocity[0].transpose(0, 1)

    def block(self, block: int, seen: list[int]) -> Tensor:
        """Velocity of the noisy block; then the clean pass commits it."""
        frames = slice(block * CHUNK, (block + 1) * CHUNK)
        clean, eps = self.clips.latents[0, frames], self.noise.eps[0, frames]
        timestep, sigma, _ = self.noise.levels[0, block].tolist()
        velocity = self.run(block, (1 - sigma) * clean + sigma * eps, timestep, seen, -1)
        self.run(block, clean, 0.0, seen, block)
        return velocity


@pytest.mark.parametrize("cuts", [None, [False, False, True, False, False, True]], ids=["full", "window"])
@torch.no_grad()
def test_cached_inference_equals_teacher_forcing(cuts: list[bool] | None) -> None:
    chunks = 3 if cuts is None else len(cuts)
    dit, clips = random_dit(), random_clips(cuts, chunks)
    noise = draw_noise(clips, 5.0, torch.Generator().manual_seed(1))
    embeddings = torch.randn(1, chunks, PRESET.dit.text_len, PRESET.dit.text_dim)
    forced = predict_velocity(dit, PRESET, embeddings, clips, noise)[0]
    cached = CachedRun(dit, clips, noise, embeddings)
    for block in range(chunks):
        seen = list(range(block + 1)) if cuts is None else list(visible_blocks(cuts, 4)[block])
        got = cached.block(block, seen)
        wanted = forced[block * CHUNK : (block + 1) * CHUNK]
        assert (got - wanted).norm() <= 1e-5 * wanted.norm(), block


@pytest.mark.parametrize("cuts", [None, [[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]], ids=["full", "window"])
def test_block_attention_equals_the_mask(cuts: list[list[bool]] | None) -> None:
    history = full_history(6) if cuts is None else torch.stack([window_history(c, 4) for c in cuts])
    clips = Clips(torch.zeros(2, 48, 1, 1, 1), torch.zeros(2, 6, 1), history, 6 if cuts is None else 4)
    q, k, v = torch.randn(3, 2, 11 * 5, 2, 16).unbind(0)
    kept = [i for i in range(12) if i != 5]  # nothing looks at the last clean block, so it is left out
    mask = block_mask(history)
    assert not mask[..., kept, 5].any()
    mask = mask[..., kept, :][..., kept].repeat_interleave(5, -1).repeat_interleave(5, -2).reshape(-1, 1, 55, 55)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    assert torch.allclose(block_attention(clips, 5)(0, q, k, v), dense, atol=1e-6)


def test_dit_and_text_encoder_fit_the_budget() -> None:
    count = sum(p.numel() for m in (CausalDiT(PRESET.dit), TextEncoder(PRESET.text)) for p in m.parameters())
    assert count <= 7_000_000


def test_state_dict_has_the_keys_of_the_large_model() -> None:
    keys = set(CausalDiT(PRESET.dit).state_dict())
    outer = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    linears = [*outer, "time_projection.1", "head.head", *quantized_linears(CausalDiT(PRESET.dit))]
    wanted = {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")} | {"head.modulation"}
    for i in range(PRESET.dit.layers):
        wanted |= {f"blocks.{i}.modulation", f"blocks.{i}.norm3.weight", f"blocks.{i}.norm3.bias"}
        wanted |= {f"blocks.{i}.{a}.norm_{n}.weight" for a in ("self_attn", "cross_attn") for n in "qk"}
    assert keys == wanted


def test_patches_keep_their_order() -> None:
    dit = random_dit()
    latents = torch.randn(2, PRESET.dit.channels, CHUNK, *PRESET.latent_hw)
    by_conv = dit.patch_embedding(latents).flatten(2).transpose(1, 2)
    weight = dit.patch_embedding.weight.flatten(1)
    assert torch.allclose(dit.patchify(latents) @ weight.T + dit.patch_embedding.bias, by_conv, atol=1e-5)
    marked = torch.arange(128 * 64, dtype=torch.float32).reshape(128, 64)
    grid = dit.unpatchify(marked, 8, 8, 8)
    for c, f, y, x in ((0, 0, 0, 0), (3, 2, 5, 6), (15, 7, 7, 7)):
        token = f * 16 + (y // 2) * 4 + x // 2
        assert grid[c, f, y, x] == token * 64 + ((y % 2) * 2 + x % 2) * 16 + c


def test_each_chunk_reads_its_own_prompt() -> None:
    q, context = torch.randn(2, 6, 4, 64), torch.randn(2, 3, 2, 32, 4, 64)
    out = segment_cross_attention(q, context)
    for b in range(2):
        for s in range(3):
            wanted = dense_cross_attention(q[b, 2 * s : 2 * s + 2], context[b, s])
            assert torch.allclose(out[b, 2 * s : 2 * s + 2], wanted, atol=1e-5)


def test_loss_is_weighted_by_block() -> None:
    clips = random_clips(None, 2)
    levels = torch.tensor([[[500.0, 0.5, 2.0], [900.0, 0.9, 0.0]]])
    noise = Noise(torch.randn(clips.latents.shape), levels)
    velocity = (
        noise.eps
        - clips.latents
        + torch.cat((torch.full((CHUNK,), 1.0), torch.full((CHUNK,), 3.0)))[None, :, None, None, None]
    )
    weighted, plain = flow_loss(velocity, clips, noise)
    assert torch.isclose(weighted, torch.tensor(1.0), atol=1e-4) and torch.isclose(plain, torch.tensor(5.0), atol=1e-4)
