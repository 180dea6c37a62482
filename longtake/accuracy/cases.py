"""Realistic, seeded inputs of every network, for comparing two ways of running it.

The window cases use a cache that was filled by actual writes, as in a session: all chunks but the last of a window written, which is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longtake.accuracy.runners import Feeds, Runner, TorchRunner
from longtake.accuracy.world_cases import camera_cases, world_cases
from longtake.dtypes import DTYPES
from longtake.formats.recipe import Recipe
from longtake.training.models.families import family_of
from longtake.training.models.load import Models
from longtake.training.models.network_spec import NetworkSpec
from longtake.training.models.presets import Preset
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid


def random_text(preset: Preset, generator: torch.Generator) -> Feeds:
    """Embeddings as a text encoder that is not exported might give them: half of the rows are padding."""
    embeddings = torch.randn(1, preset.dit.text_len, preset.dit.text_dim, generator=generator)
    embeddings[:, preset.dit.text_len // 2 :] = 0
    return {"embeddings": embeddings}


def cases(
    models: Models, recipe: Recipe, name: str, text: Feeds, run: Runner, generator: torch.Generator
) -> Iterator[tuple[str, Feeds]]:
    """The named input sets of one network; `text` holds the outputs of the networks before it."""
    preset = models.preset
    family = family_of(preset)
    spec = family.spec(preset, recipe, name)
    if name == "text_encoder":
        tokens = torch.zeros(1, preset.text.length, dtype=torch.int32)
        words = preset.text.length // 2
        tokens[0, :words] = torch.randint(2, 2 + len(models.vocabulary), (words,), generator=generator)
        yield "a prompt", {"tokens": tokens}
    elif name == "context":
        yield "a prompt", {"embeddings": text["embeddings"]}
    elif name == "camera":
        yield from camera_cases(spec, generator)
    elif name == "dit" and "camera" in family.can:
        yield from world_cases(preset, spec, text, empty_caches(spec), run, generator)
    elif name == "dit":
        yield from _dit_cases(preset, spec, text, run, generator)
    elif name.endswith("first"):
        yield "start of a clip", {spec.inputs[0].name: (value := _random(spec, generator))}
        if spec.inputs[0].name != "frames":  # frames beyond [-1, 1] must be clamped
            yield "far out", {spec.inputs[0].name: 4 * value}
    else:
        name = name.replace("steady", "first")
        first = family.spec(preset, recipe, name)
        outputs = TorchRunner(models, name, recipe)({first.inputs[0].name: _random(first, generator)})
        names = [b.name for b in spec.inputs]
        for step in ("second step", "third step"):
            feeds = dict(zip(names, [_random(spec, generator), *list(outputs.values())[1:]]))
            yield step, feeds
            outputs = run(feeds)
        if spec.inputs[0].name != "frames":
            yield "far out", {**feeds, spec.inputs[0].name: 4 * feeds[spec.inputs[0].name]}


def _random(spec: NetworkSpec, generator: torch.Generator) -> Tensor:
    """Latents of unit variance, or frames in [-1, 1]."""
    value = torch.randn([int(d) for d in spec.inputs[0].shape], generator=generator)
    return value.clamp(-1, 1) if spec.inputs[0].name == "frames" else value


def dit_cases(window: int) -> list[tuple[str, list[int], int, int]]:
    """(name, slots read, chunk index, slot written): what a session does at its start, in its middle, and committing."""
    names = ("first chunk", "one chunk read", "two chunks read", *(f"{n} chunks read" for n in range(3, window - 1)))
    few = [(name, [*range(chunk), -1], chunk, -1) for chunk, name in enumerate(names[: window - 1])]
    full, last = [*range(window - 1), -1], window - 1
    return [*few, ("full window", full, last, -1), ("full window, writes", full, last, last)]


def _dit_cases(
    preset: Preset, spec: NetworkSpec, context: Feeds, run: Runner, generator: torch.Generator
) -> Iterator[tuple[str, Feeds]]:
    caches = empty_caches(spec)
    for chunk in range(preset.window_chunks - 1):
        feeds = dit_feeds(preset, context, caches, list(range(chunk)) + [-1], chunk, chunk, 0.0, generator)
        caches = dict(zip(caches, list(run(feeds).values())[1:]))
    for name, table, chunk, slot in dit_cases(preset.window_chunks):
        timestep = 0.0 if slot >= 0 else 700.0
        yield name, dit_feeds(preset, context, caches, table, chunk, slot, timestep, generator)


def empty_caches(spec: NetworkSpec) -> Feeds:
    """Zeros for the bindings that are written in place; bf16 ones as fp32."""
    aliased = {source for _, source in spec.aliases}
    return {
        b.name: torch.zeros([int(d) for d in b.shape], dtype=DTYPES[b.dtype].host.torch)
        for b in spec.inputs
        if b.name in aliased
    }


def dit_feeds(
    preset: Preset,
    context: Feeds,
    caches: Feeds,
    table: list[int],
    chunk: int,
    slot: int,
    timestep: float,
    generator: torch.Generator,
) -> Feeds:
    """Inputs of one DiT pass in spec order: random latents of chunk `chunk` at `timestep`, slots `table` read."""
    frames = preset.chunk_latents
    cos, sin = rope_tables(preset.dit, torch.arange(frames) + chunk * frames, preset.grid_hw)
    return {
        "latents": torch.randn(1, preset.dit.channels, frames, *preset.latent_hw, generator=generator),
        "timestep_sinusoid": timestep_sinusoid(torch.full((frames,), timestep), preset.dit.freq_dim),
        "rope_cos": cos,
        "rope_sin": sin,
        "table": torch.tensor(table, dtype=torch.int32),
        "write_slot": torch.tensor([slot], dtype=torch.int32),
        **context,
        **caches,
    }
