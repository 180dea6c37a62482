"""Stage 1 of SANA-WM: frame-wise gated delta networks, softmax attention in every fourth block, a camera branch in all.

One forward takes one chunk and what the chunks before it left, and gives what it leaves itself. A whole sequence is the
same forward, chunk after chunk (chunk-causal), or once for all of it (bidirectional). State-dict keys are the publisher's.

Legend: C latent channels, F latent frames of a chunk, P tokens of a frame, H heads, D head_dim, E text length. "..." is
[B] or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from longtake.plugins.pointwise import layer_norm
from longtake.training.models.sana_wm.attention import Camera, Carried, CrossAttention, RMSNorm, SelfAttention
from longtake.training.models.sana_wm.config import SanaWMConfig
from longtake.training.models.sana_wm.ffn import FeedForward
from longtake.training.models.sana_wm.kit import PLAIN, Kit

RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
Attend = Callable[[int, bool, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Chunk:
    """What the blocks read of a chunk, besides its tokens.

    rope, camera: see `rope.tables` and `attention.Camera`. plucker: of each block, from `DiT.plucker`; None without a
    camera. attend: `attend(layer, camera, q, k, v)`, all [..., F,P,H,D], of softmax blocks. carried: of each block, from
    the chunk before.
    """

    rope: tuple[Tensor, Tensor]
    camera: Camera
    plucker: Sequence[Tensor] | None
    attend: Attend
    carried: Sequence[Carried]
    kit: Kit = field(default=PLAIN)


def modulated(x: Tensor, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift in fp32, in x's dtype; x [..., F,P,dim], shift and scale [..., F,dim]."""
    return (layer_norm(x, eps) * (1 + scale.unsqueeze(-2)) + shift.unsqueeze(-2)).to(x.dtype)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y in fp32, in x's dtype."""
    return (x.float() + gate.unsqueeze(-2) * y.float()).to(x.dtype)


class Block(nn.Module):
    """Attention, the camera's maps, cross-attention, and the feed-forward network."""

    def __init__(self, config: SanaWMConfig, layer: int) -> None:
        super().__init__()
        self.eps, self.layer = config.eps, layer
        self.attn = SelfAttention(config, layer)
        self.cross_attn = CrossAttention(config)
        self.mlp = FeedForward(config)
        self.plucker_proj = nn.Linear(config.dim, config.dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, config.dim) / config.dim**0.5)

    def forward(
        self, x: Tensor, e6: Tensor, context: Tensor, mask: Tensor, chunk: Chunk, grid: tuple[int, int]
    ) -> tuple[Tensor, Carried]:
        """x [..., F,P,dim], e6 [..., F,6,dim], context [..., 2,E,H,D], mask [..., E]."""
        m = (self.scale_shift_table.float() + e6.float()).unbind(-2)
        carried = chunk.carried[self.layer]
        attend = partial(chunk.attend, self.layer)
        u = modulated(x, self.eps, m[0], m[1])
        y, kept = self.attn(u, chunk.rope, chunk.camera, attend, carried, chunk.kit)
        x = gated(x, y, m[2])
        if chunk.plucker is not None:
            x = x + chunk.plucker[self.layer].to(x.dtype)
        x = x + self.cross_attn(x, context, mask)
        y, kept.ffn = self.mlp(modulated(x, self.eps, m[3], m[4]), carried.ffn, grid, chunk.kit)
        return gated(x, y, m[5]), kept


class FinalLayer(nn.Module):
    """Final modulation, by the un-projected time embedding, and projection to latents."""

    def __init__(self, config: SanaWMConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.linear = nn.Linear(config.dim, config.channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table.float() + e.float().unsqueeze(-2)).unbind(-2)
        return self.linear(modulated(x, self.eps, shift, scale))


class _Embedder(nn.Module):
    """A 1x1x1 convolution of the publisher's, as the linear it is."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class _TimeEmbedder(nn.Module):
    def __init__(self, config: SanaWMConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))


class _Caption(nn.Module):
    def __init__(self, config: SanaWMConfig) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(config.text_dim, config.dim), nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class _TextEmbedder(nn.Module):
    def __init__(self, config: SanaWMConfig) -> None:
        super().__init__()
        self.y_proj = _Caption(config)


class SanaWMDiT(nn.Module):
    """Velocity v = eps - x0 of a chunk, given text, camera and what the chunks before it left."""

    family = "sana_wm"  # in families.py

    def __init__(self, config: SanaWMConfig) -> None:
        super().__init__()
        self.config, self.checkpointing = config, False
        dim = config.dim
        self.x_embedder = _Embedder(config.channels, dim)
        self.plucker_embedder = _Embedder(config.plucker_channels, dim)
        self.t_embedder = _TimeEmbedder(config)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = _TextEmbedder(config)
        self.attention_y_norm = RMSNorm(dim, config.norm_eps, 0.01)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_layer = FinalLayer(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier linears, and new parts that at first do nothing: see `SelfAttention.reset_parameters`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (*self.t_embedder.mlp, *self.y_embedder.y_proj.children()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.plucker_embedder.proj.weight)
        for block in self.blocks:
            nn.init.zeros_(block.plucker_proj.weight)  # type: ignore[union-attr, arg-type]
            block.attn.reset_parameters()  # type: ignore[union-attr, operator]
            nn.init.zeros_(block.mlp.t_conv.weight)  # type: ignore[union-attr, arg-type]

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    def text(self, embeddings: Tensor) -> Tensor:
        """What every block's cross-attention sees of embeddings [..., E, text_dim]: [..., E, dim]."""
        return self.attention_y_norm(self.y_embedder.y_proj(embeddings.to(self.dtype)))

    def context(self, embeddings: Tensor) -> list[Tensor]:
        """Every block's cross-attention K and V of text embeddings [..., E, text_dim]: each [..., 2, E, H, D]."""
        text = self.text(embeddings)
        return [block.cross_attn.keys_values(text) for block in self.blocks]  # type: ignore[union-attr, operator]

    def plucker(self, maps: Tensor) -> list[Tensor]:
        """What every block adds of the camera's maps [..., 6 * stride, F, h, w]: each [..., F, P, dim]."""
        tokens = self.plucker_embedder(tokens_of(maps.to(self.dtype)))
        return [block.plucker_proj(tokens) for block in self.blocks]  # type: ignore[operator]

    def time(self, sinusoid: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding [..., F, dim] and its projection [..., F, 6, dim] of a sinusoid [..., F, freq_dim]."""
        e = self.t_embedder.mlp(sinusoid.to(self.dtype))
        return e, self.t_block(e).unflatten(-1, (6, -1))

    def forward(
        self, latents: Tensor, sinusoid: Tensor, context: Sequence[Tensor], mask: Tensor, chunk: Chunk
    ) -> tuple[Tensor, list[Carried]]:
        """Velocity, fp32 [..., C, F, h, w], and what each block leaves for the next chunk.

        Args:
            latents: [..., C, F, h, w].
            sinusoid: of each frame's timestep, [..., F, freq_dim].
            context: from `context`. mask: added to the scores of each position of the text, fp32 [..., E].
        """
        grid = latents.shape[-2], latents.shape[-1]
        e, e6 = self.time(sinusoid)
        x = self.x_embedder(tokens_of(latents.to(self.dtype)))
        kept = []
        for layer, block in enumerate(self.blocks):
            run = partial(checkpoint, block, **RECOMPUTED) if self.checkpointing else block
            x, left = run(x, e6, context[layer], mask, chunk, grid)
            kept.append(left)
        out = self.final_layer(x, e).float().unflatten(-2, grid)
        return out.movedim(-1, -4), kept


def tokens_of(latents: Tensor) -> Tensor:
    """[..., C, F, h, w] to [..., F, h * w, C]."""
    return latents.movedim(-4, -1).flatten(-3, -2)
