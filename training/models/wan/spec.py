"""The bindings of this family's networks, one function a network: names, dtypes, shapes, and what is written in place.

Legend: C latent channels, F latent frames of a chunk, T tokens of a chunk, D head_dim, E text length, W window length.
"""

from __future__ import annotations

from longtake.errors import LongtakeError
from longtake.plugins.cache_format import cache_tensors
from longtake.training.models.family import Precision
from longtake.training.models.network_spec import NETWORKS, Binding, NetworkSpec, rank_network, ranks_of, shared_network
from longtake.training.models.presets import Preset
from longtake.training.models.wan.vae_caches import PATCH, decoder_cache_shapes, encoder_cache_shapes, rank_rows
from longtake.training.models.wan.vae_codes import coded_caches


def networks_of(preset: Preset) -> tuple[str, ...]:
    """The networks of `preset` that are exported and built. A umT5 text encoder is not: it runs in PyTorch, once a
    prompt, and would be 11 GB of engine."""
    return tuple(
        name for name in NETWORKS if name != "camera" and (name != "text_encoder" or preset.text.kind == "words")
    )


def cache_bindings(preset: Preset, cache: str, layer: int, ranks: int = 1) -> tuple[Binding, ...]:
    """The cache inputs of `layer`; the outputs are the same names with `_out` appended. Of several ranks each has its heads."""
    dit = preset.dit
    slots = preset.window_chunks
    sizes = {"S": slots, "2": 2, "L": preset.chunk_tokens, "H": dit.heads // ranks, "D": dit.head_dim}
    sizes |= {"D/2": dit.head_dim // 2, "D/16": dit.head_dim // 16}
    return tuple(
        Binding(f"{t.name}_{layer}", "bf16" if t.dtype == "compute" else t.dtype, tuple(sizes[d] for d in t.shape))
        for t in cache_tensors(cache)
    )


def _out(binding: Binding) -> Binding:
    return Binding(f"{binding.name}_out", binding.dtype, binding.shape)


def text_encoder_spec(preset: Preset) -> NetworkSpec:
    """Token ids (0 is padding) to embeddings; rows past the last token are zero."""
    return NetworkSpec(
        "text_encoder",
        inputs=(Binding("tokens", "int32", (1, preset.text.length)),),
        outputs=(Binding("embeddings", "fp32", (1, preset.text.length, preset.text.dim)),),
    )


def context_bindings(preset: Preset) -> tuple[Binding, ...]:
    """Cross-attention K and V of each layer, [2, E, heads, head_dim]: computed once a prompt."""
    dit = preset.dit
    return tuple(Binding(f"context_{i}", "bf16", (2, dit.text_len, dit.heads, dit.head_dim)) for i in range(dit.layers))


def context_spec(preset: Preset) -> NetworkSpec:
    """Text embeddings to every layer's cross-attention K and V."""
    dit = preset.dit
    return NetworkSpec(
        "context",
        inputs=(Binding("embeddings", "fp32", (1, dit.text_len, dit.text_dim)),),
        outputs=context_bindings(preset),
    )


def dit_spec(preset: Preset, cache: str, ranks: int = 1) -> NetworkSpec:
    """One DiT pass over one chunk: velocity out, and K/V written to `write_slot` unless that is -1. Of several ranks that
    share the pass each has its latent frames of the chunk, and of the cache its heads."""
    dit, frames, tokens = preset.dit, preset.chunk_latents // ranks, preset.chunk_tokens // ranks
    latent = (1, dit.channels, frames, *preset.latent_hw)
    caches = tuple(b for i in range(dit.layers) for b in cache_bindings(preset, cache, i, ranks))
    return NetworkSpec(
        "dit" if ranks == 1 else rank_network(ranks),
        inputs=(
            Binding("latents", "fp32", latent),
            Binding("timestep_sinusoid", "fp32", (frames, dit.freq_dim)),
            Binding("rope_cos", "fp32", (tokens, dit.head_dim // 2)),
            Binding("rope_sin", "fp32", (tokens, dit.head_dim // 2)),
            Binding("table", "int32", ("W",)),
            Binding("write_slot", "int32", (1,)),
            *context_bindings(preset),
            *caches,
        ),
        outputs=(Binding("velocity", "fp32", latent), *(_out(b) for b in caches)),
        aliases=tuple((f"{b.name}_out", b.name) for b in caches),
        profile=(("W", (1, preset.window_chunks, preset.window_chunks)),),
        slot="write_slot",
    )


def vae_spec(preset: Preset, name: str, vae_ops: str = "engine", vae_conv: str = "bf16", ranks: int = 1) -> NetworkSpec:
    """One step of a VAE stream, in either direction.

    vae_first: one latent to one frame and fresh caches; vae_steady: one latent and caches to four frames.
    vae_encoder_first and vae_encoder_steady: the same from frames to latents, one group at a time.
    With `vae_ops` "library" the decoder's caches are [T, H, W, C], and vae_steady writes them in place; unless `vae_conv`
    is "bf16" those of convolutions that run in 8-bit codes are codes. Of several ranks each has rows of the frames, ghost
    rows among them (`rank_rows`); the latent is whole.
    """
    encoder, first = name.startswith("vae_encoder"), name.endswith("first")
    ops = vae_ops == "library" and not encoder
    frames = 1 if first else preset.vae.stride[0]
    latent = Binding("latent", "fp32", (1, preset.vae.z_channels, 1, *preset.latent_hw))
    height = preset.height if ranks == 1 else PATCH * rank_rows(preset, preset.height // PATCH, ranks)
    video = Binding("frames", "fp32", (1, 3, frames, height, preset.width))
    shapes, prefix = (
        (encoder_cache_shapes(preset), "vae_encoder_cache")
        if encoder
        else (decoder_cache_shapes(preset, ops, ranks), "vae_cache")
    )
    coded = coded_caches(preset.vae) if ops and vae_conv != "bf16" else ("",) * len(shapes)
    caches = tuple(
        Binding(f"{prefix}_{i}", "int8" if conv else "bf16", shape)
        for i, (shape, conv) in enumerate(zip(shapes, coded))
    )
    pairs = tuple((f"{b.name}_out", b.name) for b in caches)
    source, result = (video, latent) if encoder else (latent, video)
    return NetworkSpec(
        name if ranks == 1 else rank_network(ranks, name),
        inputs=(source, *(() if first else caches)),
        outputs=(result, *(_out(b) for b in caches)),
        aliases=pairs if ops and not first else (),
        carried=() if ops and not first else pairs,
    )


def network_spec(preset: Preset, recipe: Precision, name: str) -> NetworkSpec:
    """The spec of one network as `recipe` wants it. Raises LongtakeError for an unknown one."""
    if name == "text_encoder":
        return text_encoder_spec(preset)
    if name == "context":
        return context_spec(preset)
    name, ranks = shared_network(name), ranks_of(name)
    if name == "dit":
        return dit_spec(preset, recipe.cache, ranks)
    if name in NETWORKS and name != "camera":
        return vae_spec(preset, name, recipe.vae_ops, recipe.vae_conv, ranks)
    raise LongtakeError("unknown network", got=name, expected=", ".join(NETWORKS))
