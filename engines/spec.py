"""The engine spec: every binding's name, dtype, shape and alias. Export, build and runtime read this one place.

Legend: C latent channels, F latent frames of a chunk, T tokens of a chunk, D head_dim, E text length, W window length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longtake.plugins.spec import cache_tensors
from longtake.training.presets import Preset

NETWORKS = ("text_encoder", "context", "dit", "vae_first", "vae_steady")


@dataclass(frozen=True)
class Binding:
    """One network input or output. dtype is "fp32", "bf16", "int32" or "int8"; a str dimension is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class NetworkSpec:
    """Bindings of one network. `aliases` maps an output to the input it is written over.

    `profile` gives (min, opt, max) for each dynamic dimension. `carried` maps an output of this call to the input
    of the next one that it becomes (VAE caches), without being in place.
    """

    name: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    carried: tuple[tuple[str, str], ...] = ()
    profile: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description, for manifests and digests."""
        return {
            "name": self.name,
            "inputs": [[b.name, b.dtype, list(b.shape)] for b in self.inputs],
            "outputs": [[b.name, b.dtype, list(b.shape)] for b in self.outputs],
            "aliases": [list(pair) for pair in self.aliases],
            "carried": [list(pair) for pair in self.carried],
            "profile": [[name, list(sizes)] for name, sizes in self.profile],
        }


def cache_bindings(preset: Preset, cache: str, layer: int) -> tuple[Binding, ...]:
    """The cache inputs of `layer`; the outputs are the same names with `_out` appended."""
    dit = preset.dit
    slots = preset.window_chunks
    sizes = {"S": slots, "2": 2, "L": preset.chunk_tokens, "H": dit.heads, "D": dit.head_dim}
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


def dit_spec(preset: Preset, cache: str) -> NetworkSpec:
    """One DiT pass over one chunk: velocity out, and K/V written to `write_slot` unless that is -1."""
    dit, frames = preset.dit, preset.chunk_latents
    latent = (1, dit.channels, frames, *preset.latent_hw)
    caches = tuple(b for i in range(dit.layers) for b in cache_bindings(preset, cache, i))
    return NetworkSpec(
        "dit",
        inputs=(
            Binding("latents", "fp32", latent),
            Binding("timestep_sinusoid", "fp32", (frames, dit.freq_dim)),
            Binding("rope_cos", "fp32", (preset.chunk_tokens, dit.head_dim // 2)),
            Binding("rope_sin", "fp32", (preset.chunk_tokens, dit.head_dim // 2)),
            Binding("table", "int32", ("W",)),
            Binding("write_slot", "int32", (1,)),
            *context_bindings(preset),
            *caches,
        ),
        outputs=(Binding("velocity", "fp32", latent), *(_out(b) for b in caches)),
        aliases=tuple((f"{b.name}_out", b.name) for b in caches),
        profile=(("W", (1, preset.window_chunks, preset.window_chunks)),),
    )


def vae_spec(preset: Preset, name: str) -> NetworkSpec:
    """`vae_first`: one latent to one frame and fresh caches; `vae_steady`: one latent and caches to four frames."""
    from longtake.training.vae import decoder_cache_shapes

    latent = (1, preset.vae.z_channels, 1, *preset.latent_hw)
    frames = 1 if name == "vae_first" else preset.vae.stride[0]
    caches = tuple(Binding(f"vae_cache_{i}", "bf16", shape) for i, shape in enumerate(decoder_cache_shapes(preset)))
    return NetworkSpec(
        name,
        inputs=(Binding("latent", "fp32", latent), *(() if name == "vae_first" else caches)),
        outputs=(Binding("frames", "fp32", (1, 3, frames, preset.height, preset.width)), *(_out(b) for b in caches)),
        carried=tuple((f"{b.name}_out", b.name) for b in caches),
    )


def network_spec(preset: Preset, cache: str, name: str) -> NetworkSpec:
    """The spec of one of NETWORKS; `cache` is the cache format ("nvfp4" or "bf16")."""
    if name == "text_encoder":
        return text_encoder_spec(preset)
    if name == "context":
        return context_spec(preset)
    if name == "dit":
        return dit_spec(preset, cache)
    return vae_spec(preset, name)
