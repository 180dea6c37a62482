"""The umT5 encoder: T5 with a relative position bias of its own in every layer, RMS norms and a gated GELU.

Written out here, not taken from transformers (which is the oracle of its tests): one prompt's rows are a matrix, so that
every linear exports as one Gemm under its own name; and a layer is a module of its own, which `PagedUMT5` runs one by one.

Legend: P prompts, E tokens of a prompt (padded), H heads, D head size, V vocabulary, B buckets.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.training.models.presets import TextEncoderConfig
from longtake.training.models.text.sentencepiece import PieceTokenizer

BUCKETS = 32
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)  # from 8 on: 8 * 2 ** (k / 2), rounded up
EPS = 1e-6
MASKED = -1e9


def relative_buckets(length: int, device: torch.device) -> Tensor:
    """Bucket of key position minus query position, int64 [E, E].

    T5's bidirectional rule, in integers so that every device and runtime agrees: a distance's bucket is the number of
    STEPS it reaches (one each up to 8, then half an octave each); the upper half of the buckets is for keys ahead.
    """
    distance = torch.arange(1 - length, length, device=device)
    bucket = (distance.abs()[:, None] >= torch.tensor(STEPS, device=device)).sum(-1) + BUCKETS // 2 * (distance > 0)
    place = torch.arange(length, device=device)
    return bucket[place[None, :] - place[:, None] + length - 1]


def attended(tokens: Tensor) -> Tensor:
    """Which tokens are words, bool [P, E]: all up to the last that isn't padding (id 0), as an attention mask would say."""
    place = torch.arange(1, tokens.shape[-1] + 1, dtype=torch.int32, device=tokens.device)
    return place <= torch.where(tokens != 0, place, 0).amax(-1, keepdim=True)


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean in fp32, the product in the weight's dtype, as in T5."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Self-attention without a scale; softmax in fp32."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [P * E, dim]; bias fp32 [P, H, E, E] is added to the scores."""
        rows = (-1, bias.shape[-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (p(x).reshape(rows).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = ((q @ k.transpose(-1, -2)).float() + bias).softmax(-1).to(v.dtype)
        return self.o((weights @ v).transpose(1, 2).reshape(x.shape))


class GatedFFN(nn.Module):
    """down(gelu(gate(x)) * up(x)), GELU by its tanh formula."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, ffn_dim, bias=False), nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.gate(x), approximate="tanh") * self.up(x))


class UMT5Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.dim), RMSNorm(config.dim)
        self.attn = Attention(config.dim, config.heads)
        self.position = nn.Embedding(BUCKETS, config.heads)
        self.ffn = GatedFFN(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, mask: Tensor, buckets: Tensor) -> Tensor:
        """x [P * E, dim]; mask fp32 [P, 1, 1, E] is added to the scores; buckets int64 [E, E]."""
        bias = functional.embedding(buckets, self.position.weight).permute(2, 0, 1).float() + mask
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5(nn.Module):
    """umT5 encoder; rows of padding come out zero.

    Args:
        config: a TextEncoderConfig of kind "umt5".
        tokenizer: folder with the tokenizer's file; None if texts are never tokenized here.
    """

    vocabulary: tuple[str, ...] = ()  # the pieces are in the tokenizer's file

    def __init__(self, config: TextEncoderConfig, tokenizer: Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer_folder = tokenizer
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(UMT5Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)

    @property
    def tokenizer(self) -> PieceTokenizer:
        """Texts to token ids.

        Raises:
            LongtakeError: its file is missing.
        """
        return PieceTokenizer.open(self.tokenizer_folder, self.config.vocabulary)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids of `texts`, int32 [P, E]; 0 is padding."""
        return self.tokenizer(texts, self.config.length)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int32 [P, E] -> fp32 embeddings [P, E, dim]."""
        words = attended(tokens)
        mask = (~words).to(torch.float32)[:, None, None, :] * MASKED
        buckets = relative_buckets(tokens.shape[-1], tokens.device)
        x = functional.embedding(tokens.long(), self.embedding.weight).flatten(0, 1)
        for block in self.blocks:
            x = block(x, mask, buckets)
        return self.norm(x).float().unflatten(0, tokens.shape) * words[..., None].to(torch.float32)
