"""The causal video DiT of every preset: block math and state-dict keys of Wan 2.2's transformer.

Attention over history is a strategy passed in (`attend`), so one model serves cached generation, where each chunk
reads slots of a K/V cache, and teacher forcing, where a mask stands for the cache. So is what happens to queries and
keys before it (`norm_rope`): plain PyTorch, or an op of ours where a compiler makes too much of it.

Legend: B batch (may be absent), C latent channels, F latent frames, T tokens = F * frame tokens in (f, h, w) order,
H heads, D head_dim, E text length, S text segments (one a chunk). "..." is [B] or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from longtake.plugins.pointwise import apply_rope, gated_add, layer_norm, modulate, rms_norm
from longtake.training.models.presets import DiTConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
CrossAttend = Callable[[Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]
RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
NormRope = Callable[["Attention", Tensor, Tensor, Rope], tuple[Tensor, Tensor]]
Blocks = Callable[["CausalDiT", Tensor, Tensor, Rope, list[Tensor], Attend, NormRope], Tensor]


class RMSNorm(nn.Module):
    """Weight and eps of `pointwise.rms_norm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def segment_cross_attention(q: Tensor, context: Tensor) -> Tensor:
    """q [B, T, H, D] in S equal contiguous segments, segment i over prompt i of `context` [B, S, 2, E, H, D]."""
    segments = q.unflatten(1, (context.shape[1], -1)).flatten(0, 1).transpose(1, 2)
    k, v = context.flatten(0, 1).to(q.dtype).transpose(-3, -2).unbind(1)
    out = functional.scaled_dot_product_attention(segments, k, v)
    return out.transpose(1, 2).reshape(q.shape)


class Attention(nn.Module):
    """Projections and full-vector q/k RMSNorm of one attention; who attends to what is decided outside."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[..., L, dim] to [..., L, H, D]."""
        return x.unflatten(-1, (self.heads, -1))


def plain_norm_rope(own: Attention, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """q, k [..., T, dim] as `own` projects them to [..., T, H, D]: RMSNorm over dim, then RoPE."""
    return apply_rope(own.split(own.norm_q(q)), *rope), apply_rope(own.split(own.norm_k(k)), *rope)


class Block(nn.Module):
    """One transformer block: gated self-attention, cross-attention, gated FFN."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / math.sqrt(config.dim))

    def forward(
        self,
        x: Tensor,
        e0: Tensor,
        rope: Rope,
        context: Tensor,
        attend: Callable[..., Tensor],
        cross: CrossAttend,
        norm_rope: NormRope = plain_norm_rope,
    ) -> Tensor:
        """x [..., T, dim], e0 [..., F, 6, dim] -> [..., T, dim]; `attend(q, k, v)` is this layer's."""
        m = (self.modulation.float() + e0.float()).unbind(-2)
        x = gated_add(x, self.self_attention(modulate(x, self.eps, m[1], m[0]), rope, attend, norm_rope), m[2])
        x = x + self.cross_attention(x, context, cross)
        return gated_add(x, self.ffn(modulate(x, self.eps, m[4], m[3])), m[5])

    def self_attention(self, x: Tensor, rope: Rope, attend: Callable[..., Tensor], norm_rope: NormRope) -> Tensor:
        own = self.self_attn
        k, v, q = own.k(x), own.split(own.v(x)), own.q(x)  # this order is that of the gradients' sum
        q, k = norm_rope(own, q, k, rope)
        return own.o(attend(q, k, v).flatten(-2))

    def cross_attention(self, x: Tensor, context: Tensor, cross: CrossAttend) -> Tensor:
        normal = layer_norm(x, self.eps, self.norm3.weight, self.norm3.bias).to(x.dtype)
        own = self.cross_attn
        return own.o(cross(own.split(own.norm_q(own.q(normal))), context).flatten(-2))

    def context(self, text: Tensor) -> Tensor:
        """This layer's cross-attention K and V of `text` [..., E, dim]: [..., 2, E, H, D]."""
        own = self.cross_attn
        return torch.stack([own.split(own.norm_k(own.k(text))), own.split(own.v(text))], dim=-4)


class Head(nn.Module):
    """Final modulation (by the un-projected time embedding) and projection to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(config.patch) * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [..., T, dim], e [..., F, dim] -> [..., T, patch * C]."""
        shift, scale = (self.modulation.float() + e.float().unsqueeze(-2)).unbind(-2)
        return self.head(modulate(x, self.eps, scale, shift))


class CausalDiT(nn.Module):
    """Velocity v = eps - x0 of a chunk (or of a teacher-forced sequence), given text context and history.

    State-dict keys are those of Wan2.2-TI2V-5B. The compute dtype is the parameters' (or autocast's). With
    `checkpointing` a backward pass computes each block again instead of keeping what is inside it.
    """

    family = "wan"  # in families.py

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.channels, dim, config.patch, config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Wan's initialisation: Xavier linears, N(0, 0.02) text and time MLPs, a zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for mlp in (self.text_embedding, self.time_embedding):
            for linear in (mlp[0], mlp[2]):
                nn.init.normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.head.head.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def patchify(self, latents: Tensor) -> Tensor:
        """[..., C, F, H, W] to patches [..., T, C * patch], T in (f, h, w) order."""
        _, ph, pw = self.config.patch
        *batch, channels, frames, height, width = latents.shape
        grid = latents.reshape(*batch, channels, frames, height // ph, ph, width // pw, pw)
        n = len(batch)
        grid = grid.permute(*range(n), n + 1, n + 2, n + 4, n, n + 3, n + 5)
        return grid.reshape(*batch, frames * (height // ph) * (width // pw), channels * ph * pw)

    def unpatchify(self, patches: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Patches [..., T, ph * pw * C] (channel fastest) to latents [..., C, F, H, W]."""
        _, ph, pw = self.config.patch
        channels, batch = self.config.channels, patches.shape[:-2]
        n = len(batch)
        grid = patches.reshape(*batch, frames, height // ph, width // pw, ph, pw, channels)
        grid = grid.permute(*range(n), n + 5, n, n + 1, n + 3, n + 2, n + 4)
        return grid.reshape(*batch, channels, frames, height, width)

    def context(self, embeddings: Tensor) -> list[Tensor]:
        """Every layer's cross-attention K and V of text `embeddings` [..., E, text_dim]: each [..., 2, E, H, D]."""
        text = self.text_embedding(embeddings.to(self.dtype))
        return [block.context(text) for block in self.blocks]  # type: ignore[operator]

    def time(self, sinusoid: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding e [..., F, dim] and its projection e0 [..., F, 6, dim] of a sinusoid [..., F, freq_dim]."""
        e = self.time_embedding(sinusoid.to(self.dtype))
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def features(
        self,
        latents: Tensor,
        e0: Tensor,
        rope: Rope,
        context: list[Tensor],
        attend: Attend,
        cross: CrossAttend,
        norm_rope: NormRope = plain_norm_rope,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """Tokens after the last block, [..., T, dim]."""
        embed = self.patch_embedding
        x = functional.linear(self.patchify(latents.to(self.dtype)), embed.weight.flatten(1), embed.bias)
        if blocks is not None:
            return blocks(self, x, e0, rope, context, attend, norm_rope)
        for layer, block in enumerate(self.blocks):
            run = partial(checkpoint, block, **RECOMPUTED) if self.checkpointing else block
            x = run(x, e0, rope, context[layer], _of_layer(attend, layer), cross, norm_rope)
        return x

    def forward(
        self,
        latents: Tensor,
        sinusoid: Tensor,
        rope: Rope,
        context: list[Tensor],
        attend: Attend,
        cross: CrossAttend = segment_cross_attention,
        skip_frames: int = 0,
        norm_rope: NormRope = plain_norm_rope,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """Velocity, fp32 [..., C, F - skip_frames, H, W].

        Args:
            latents: [..., C, F, H, W].
            sinusoid: of each frame's timestep, [..., F, freq_dim].
            rope: cos and sin, fp32 [..., T, D/2].
            context: from `context`, one a layer; [B, S, 2, E, H, D], or [2, E, H, D] without batch.
            attend: `attend(layer, q, k, v) -> out`, all [..., T, H, D], q and k after RoPE.
            cross: cross-attention of q over one layer's context.
            skip_frames: leading frames that don't go through the head (the clean half in teacher forcing).
            norm_rope: `norm_rope(attention, q, k, rope)`, what makes q and k [..., T, H, D] of their projections.
            blocks: what runs all blocks in place of their own forward (`cross` is then its own); see `fused_block`.
        """
        e, e0 = self.time(sinusoid)
        x = self.features(latents, e0, rope, context, attend, cross, norm_rope, blocks)
        frames, (height, width) = latents.shape[-3], latents.shape[-2:]
        skipped = skip_frames * (x.shape[-2] // frames)
        patches = self.head(x[..., skipped:, :], e[..., skip_frames:, :])
        return self.unpatchify(patches.float(), frames - skip_frames, height, width)


def _of_layer(attend: Attend, layer: int) -> Callable[..., Tensor]:
    return lambda q, k, v: attend(layer, q, k, v)
