"""The bindings of this family's networks: names, dtypes, shapes, and what is written in place.

Legend: C latent channels, F latent frames of a chunk, P tokens of a frame, H heads, D head_dim, E text length, W window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from longtake.errors import LongtakeError
from longtake.training.models.family import Precision
from longtake.training.models.network_spec import NETWORKS, Binding, NetworkSpec
from longtake.training.models.presets import Preset, WorldPreset
from longtake.training.models.sana_wm.config import CONV_TAIL
from longtake.training.models.sana_wm.vae import tail_shapes

STATE_SLOTS = 2


def networks_of(preset: Preset) -> tuple[str, ...]:
    """The networks that are exported and built. Gemma is not one: it runs in PyTorch, once a prompt."""
    return tuple(name for name in NETWORKS if name != "text_encoder" or preset.text.kind == "words")


def slot_tokens(preset: WorldPreset) -> tuple[int, ...]:
    """Tokens that each slot of keys and values holds: the sink those of chunk 0, the others those of a later one."""
    later = preset.chunk_latents * preset.frame_tokens
    return (preset.first_chunk_latents * preset.frame_tokens, *[later] * (preset.window_chunks - 1))


def state_bindings(preset: WorldPreset, layer: int) -> Iterator[Binding]:
    """What block `layer` keeps; its first axis is the slot's. Slots of keys are equally long, the longest chunk's."""
    dit, tokens = preset.dit, preset.frame_tokens
    if dit.softmax(layer):
        shape = (preset.window_chunks, max(slot_tokens(preset)), dit.heads, dit.head_dim)
        for name in ("keys", "values", "camera_keys", "camera_values"):
            yield Binding(f"{name}_{layer}", "bf16", shape)
    else:
        yield Binding(f"state_{layer}", "fp32", (STATE_SLOTS, 2, dit.heads, dit.head_dim, dit.head_dim))
        yield Binding(f"norm_{layer}", "fp32", (STATE_SLOTS, dit.heads, dit.head_dim))
        yield Binding(f"conv_{layer}", "bf16", (STATE_SLOTS, dit.conv_tails, CONV_TAIL, tokens, dit.dim))
    yield Binding(f"ffn_{layer}", "bf16", (STATE_SLOTS, tokens, dit.dim))


def _out(binding: Binding) -> Binding:
    return Binding(f"{binding.name}_out", binding.dtype, binding.shape)


def context_bindings(preset: WorldPreset) -> tuple[Binding, ...]:
    """What each block reads of a prompt, K and V [2, E, H, D], and what is added to the scores of its positions."""
    dit = preset.dit
    layers = [Binding(f"context_{i}", "bf16", (2, dit.text_len, dit.heads, dit.head_dim)) for i in range(dit.layers)]
    return (Binding("text_mask", "fp32", (dit.text_len,)), *layers)


def plucker_bindings(preset: WorldPreset) -> tuple[Binding, ...]:
    """What each block adds of a chunk's cameras, the same in all passes of the chunk."""
    shape = ("F", preset.frame_tokens, preset.dit.dim)
    return tuple(Binding(f"plucker_{i}", "bf16", shape) for i in range(preset.dit.layers))


def frames_profile(preset: WorldPreset) -> tuple[str, tuple[int, int, int]]:
    """Latent frames of a chunk."""
    return "F", (preset.chunk_latents, preset.chunk_latents, preset.first_chunk_latents)


def ops_of(preset: WorldPreset) -> tuple[tuple[str, int], ...]:
    """How many nodes of each op the transformer has."""
    counts: Counter[str] = Counter()
    for layer in range(preset.dit.layers):
        softmax, clip = preset.dit.softmax(layer), "_clip" * preset.dit.clips(layer)
        counts += Counter({"ray_restore": 1, "gated_ffn": 1, "slot_write": len(list(state_bindings(preset, layer)))})
        counts[f"ray_prepare_{'softmax' if softmax else 'gdn'}{clip}"] += 1
        own = {"frame_attention": 2} if softmax else {"short_conv": 2, "gdn_scan": 1, "gdn_scan_camera": 1}
        counts += Counter(own)
    return tuple(counts.items())


def dit_spec(preset: WorldPreset) -> NetworkSpec:
    """One pass over one chunk: velocity out, and what it leaves into slot `write_slot` unless that is -1."""
    dit, tokens = preset.dit, preset.frame_tokens
    latent = (1, dit.channels, "F", *preset.latent_hw)
    state = tuple(binding for layer in range(dit.layers) for binding in state_bindings(preset, layer))
    return NetworkSpec(
        "dit",
        inputs=(
            Binding("latents", "fp32", latent),
            Binding("timestep_sinusoid", "fp32", ("F", dit.freq_dim)),
            *(Binding(f"rope_{f}", "fp32", ("F", tokens, dit.head_dim // 2)) for f in ("cos", "sin")),
            *(Binding(f"camera_rope_{f}", "fp32", ("F", tokens, dit.head_dim // 4)) for f in ("cos", "sin")),
            *(Binding(name, "fp32", ("F", tokens, 4, 4)) for name in ("rays", "inverse_rays")),
            Binding("table", "int32", ("W",)),
            Binding("read_slot", "int32", (1,)),
            Binding("write_slot", "int32", (1,)),
            *context_bindings(preset),
            *plucker_bindings(preset),
            *state,
        ),
        outputs=(Binding("velocity", "fp32", latent), *map(_out, state)),
        aliases=tuple((f"{b.name}_out", b.name) for b in state),
        profile=(frames_profile(preset), ("W", (1, preset.window_chunks, preset.window_chunks))),
        slot="write_slot",
        ops=ops_of(preset),
    )


def vae_spec(preset: WorldPreset, name: str) -> NetworkSpec:
    """One step of a VAE stream, in either direction; the first one makes the tails that later ones read."""
    encoder, first = name.startswith("vae_encoder"), name.endswith("first")
    latent = Binding("latent", "fp32", (1, preset.vae.z_channels, 1, *preset.latent_hw))
    video = Binding("frames", "fp32", (1, 3, 1 if first else preset.vae.stride[0], preset.height, preset.width))
    prefix = "vae_encoder_cache" if encoder else "vae_cache"
    shapes = tail_shapes(preset.vae, preset.height, preset.width, encoder)
    tails = tuple(Binding(f"{prefix}_{i}", "bf16", shape) for i, shape in enumerate(shapes))
    source, result = (video, latent) if encoder else (latent, video)
    return NetworkSpec(
        name,
        inputs=(source, *(() if first else tails)),
        outputs=(result, *map(_out, tails)),
        carried=tuple((f"{b.name}_out", b.name) for b in tails),
    )


def network_spec(preset: Preset, recipe: Precision, name: str) -> NetworkSpec:
    """The spec of one network. Raises LongtakeError for an unknown one."""
    assert isinstance(preset, WorldPreset)
    text, dit = preset.text, preset.dit
    if name == "text_encoder":
        tokens = Binding("tokens", "int32", (1, text.length))
        return NetworkSpec(name, (tokens,), (Binding("embeddings", "fp32", (1, text.length, text.dim)),))
    if name == "context":
        embeddings = Binding("embeddings", "fp32", (1, dit.text_len, dit.text_dim))
        return NetworkSpec(name, (embeddings,), context_bindings(preset))
    if name == "camera":
        maps = Binding("plucker", "fp32", (1, dit.plucker_channels, "F", *preset.latent_hw))
        return NetworkSpec(name, (maps,), plucker_bindings(preset), profile=(frames_profile(preset),))
    if name == "dit":
        return dit_spec(preset)
    if name in NETWORKS:
        return vae_spec(preset, name)
    raise LongtakeError("unknown network", got=name, expected=", ".join(NETWORKS))
