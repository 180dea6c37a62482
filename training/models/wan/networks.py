"""The networks that become engines: flat, positional modules around the models, one a name in `wan.spec`.

Legend: C latent channels, F latent frames of a chunk, T tokens of a chunk, E text length, W window length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.plugins.cache_format import cache_tensors
from longtake.plugins.cross_attention.reference import dense_cross_attention
from longtake.plugins.exchange import gather_heads, gather_tokens
from longtake.plugins.pointwise import QK_NORM_EPS
from longtake.training.models.family import ModelSet, Precision
from longtake.training.models.network_spec import NETWORKS, rank_network, ranks_of
from longtake.training.models.text.words import TextStep
from longtake.training.models.wan.dit import Attention, CausalDiT, Rope
from longtake.training.models.wan.fused_block import fused_blocks
from longtake.training.models.wan.vae import DecoderFirst, DecoderSteady, VAEEncoderFirst, VAEEncoderSteady
from longtake.training.models.wan.vae_codes import coded_convs
from longtake.training.models.wan.vae_library import LibraryFirst, LibrarySteady
from longtake.training.models.wan.vae_rows import RowsSteady


class ContextStep(nn.Module):
    """embeddings fp32 [1, E, text_dim] -> each layer's cross-attention K and V, [2, E, H, D] in compute dtype."""

    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.dit.context(embeddings[0]))


def fused_norm_rope(own: Attention, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """`dit.plain_norm_rope` as one op of ours: from these nodes TensorRT makes kernels that carry fp32 copies along."""
    weights = (norm.weight.to(q.dtype) for norm in (own.norm_q, own.norm_k))
    return torch.ops.longtake.qk_norm_rope(own.split(q), own.split(k), *weights, *rope)


class DiTStep(nn.Module):
    """One pass over one chunk through the cache ops; inputs and outputs as in `wan.spec.dit_spec`.

    fused: whether ops of ours do what lies between the blocks' linears."""

    def __init__(self, dit: CausalDiT, cache: str, fused: bool = False) -> None:
        super().__init__()
        import longtake.plugins.ops  # noqa: F401  (registers torch.ops.longtake)

        self.dit = dit
        self.cache = cache
        self.blocks = fused_blocks if fused else None
        self.per_layer = len(cache_tensors(cache))
        self.write = getattr(torch.ops.longtake, f"kv_cache_write_{cache}")
        self.read = getattr(torch.ops.longtake, f"sink_attention_{cache}")
        if dit.config.eps != QK_NORM_EPS:
            raise LongtakeError("the op qk_norm_rope has another eps", got=dit.config.eps, expected=QK_NORM_EPS)

    def forward(
        self,
        latents: Tensor,
        timestep_sinusoid: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        table: Tensor,
        write_slot: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """`tensors`: each layer's context, then each layer's cache tensors. Returns velocity, then the caches."""
        layers = len(self.dit.blocks)
        context, caches = list(tensors[:layers]), list(tensors[layers:])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own = slice(layer * self.per_layer, (layer + 1) * self.per_layer)
            out, caches[own] = self.attention(q, k, v, caches[own], table, write_slot)
            return out

        rope = (rope_cos, rope_sin)
        velocity = self.dit(
            latents[0], timestep_sinusoid, rope, context, attend, cross=dense_cross_attention,
            norm_rope=fused_norm_rope, blocks=self.blocks,
        )  # fmt: skip
        return (velocity[None], *caches)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: list[Tensor], table: Tensor, write_slot: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """One layer's q, k, v [T, H, D] through its `cache`: the output [T, H, D], and the cache as it is then."""
        # Write first: the slot written is never one that is read, and TensorRT builds a write in place only if
        # nothing else reads the cache as it was before.
        written = self.write(k, v, *cache, write_slot)
        cache = [written] if isinstance(written, Tensor) else list(written)
        return self.read(q, k, v, *cache, table), cache


class RankDiTStep(DiTStep):
    """What one of `ranks` exports: a pass over its frames of a chunk, with its heads of the cache. See `wan.spec.dit_spec`."""

    def __init__(self, dit: CausalDiT, cache: str, ranks: int, fused: bool = False) -> None:
        super().__init__(dit, cache, fused)
        self.ranks = ranks

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: list[Tensor], table: Tensor, write_slot: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """See DiTStep.attention; q, k, v of this rank's tokens, and all heads."""
        q, k, v = gather_tokens(q, k, v, self.ranks)
        out, cache = super().attention(q, k, v, cache, table, write_slot)
        return gather_heads(out, self.ranks), cache


VAE_STEPS = {
    "vae_first": DecoderFirst,
    "vae_steady": DecoderSteady,
    "vae_encoder_first": VAEEncoderFirst,
    "vae_encoder_steady": VAEEncoderSteady,
}


def network_module(models: ModelSet, recipe: Precision, name: str, exported: bool = False) -> nn.Module:
    """The module of network `name`, in eval mode; it shares `models`' parameters. See `Family.module`.

    What depends on the recipe: the DiT's cache format; whether nearly all of the VAE decoder's later steps is
    ops, and which of its convolutions run in 8-bit codes (an export is lowered to them); and if `exported`, whether ops do
    all that lies between the blocks' linears.
    """
    if name == "text_encoder":
        return TextStep(models.text).eval()
    if name == "context":
        return ContextStep(models.dit).eval()
    fused = exported and recipe.linears == "library"
    if name == "dit":
        return DiTStep(models.dit, recipe.cache, fused).eval()
    ranks = ranks_of(name)
    if ranks > 1 and name == rank_network(ranks):
        return RankDiTStep(models.dit, recipe.cache, ranks, fused).eval()
    if ranks > 1 and name == rank_network(ranks, "vae_steady"):
        return RowsSteady(models.vae, ranks).eval()
    if name in VAE_STEPS:
        decoder = recipe.vae_ops == "library" and "encoder" not in name
        coded = coded_convs(models.vae, recipe.vae_conv, models.convs) if decoder and not exported else {}
        if decoder and name == "vae_steady":
            return LibrarySteady(models.vae, coded=coded).eval()
        if coded:
            return LibraryFirst(models.vae, coded).eval()
        return VAE_STEPS[name](models.vae, ops=decoder).eval()
    raise LongtakeError("unknown network", got=name, expected=", ".join(NETWORKS))
