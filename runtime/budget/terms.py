"""The terms of a memory budget, from a recipe's shapes and, where they are there, its built engines or exported files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtake.dtypes import DTYPES, stored_bytes
from longtake.errors import LongtakeError
from longtake.formats.memory import DECODER, DECODER_CACHES, LANES, WORKING, Known, RecordedTerm
from longtake.formats.recipe import Recipe
from longtake.formats.segmented_graph import SegmentedGraph
from longtake.runtime.frames import staging_bytes
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import Binding, NetworkSpec, rank_network
from longtake.training.models.presets import Preset, TextEncoderConfig
from longtake.training.models.text.runner import KEPT

# Without engines: tensors of the FFN's width, or of the decoder's largest activation, that are alive at once.
FFN_TENSORS_ALIVE, DECODER_TENSORS_ALIVE = 3, 4.4
NOTHING_VARIES: Mapping[str, int] = {}
COMMUNICATOR_BYTES = 500_000_000  # NCCL's channels and buffers, also those that graphs have captured; not measured
GHOST_ROWS = 2  # of a rank's latent, on both sides together: more than its share at every resolution
SOLVER_LATENTS = 8  # noise, sample, corrected, predictions, velocity and its copy, in fp32


def terms_of(
    recipe: Recipe, engines: Path | None = None, preset: Preset | None = None, ranks: int = 1
) -> tuple[RecordedTerm, ...]:
    """What `recipe` takes, in any use; engines: folder of plans, where they are built. `preset` overrides the recipe's. ranks:
    GPUs that share it; what it takes on the first of them, which has the encoders, too."""
    model = preset or recipe.model
    parts = (
        _generating(recipe, model, engines, ranks),
        _decoding(recipe, model, engines, ranks),
        _apart(recipe, model),
        [RecordedTerm("communicator", COMMUNICATOR_BYTES, "estimated")] * (ranks > 1),
    )
    return tuple(term for part in parts for term in part)


def part_of(network: str, ranks: int) -> str:
    """What one of `ranks` GPUs runs of `network`."""
    return network if ranks == 1 else rank_network(ranks, network)


def _generating(recipe: Recipe, preset: Preset, engines: Path | None, ranks: int) -> Iterable[RecordedTerm]:
    family = family_of(preset)
    dit, context = family.spec(preset, recipe, part_of("dit", ranks)), family.spec(preset, recipe, "context")
    camera = [family.spec(preset, recipe, "camera")] if "camera" in family.can else []
    names = [
        "context",
        *(spec.name for spec in camera),
        "dit",
        *(["text_encoder"] if preset.text.kind == "words" else []),
    ]
    cached, prompt, kept = "K/V cache", "prompts' K/V and embeddings", total_bytes(context.outputs)
    most = longest(dit)
    embeddings = 4 * KEPT * preset.text.length * preset.text.dim if preset.text.kind != "words" else 0
    caches = state_bindings(dit)
    cache = total_bytes(caches)
    static = [*(binding for binding in dit.inputs if binding not in caches), dit.outputs[0]]  # and the velocity
    return [
        *(weights_term(recipe, preset, name, engines) for name in names),
        RecordedTerm(cached, cache, "exact"),
        RecordedTerm("static buffers", total_bytes(static, most), "exact"),
        *(
            RecordedTerm("a chunk's cameras", total_bytes((*spec.inputs, *spec.outputs), most), "exact")
            for spec in camera
        ),
        RecordedTerm(prompt, kept + embeddings, "exact"),
        RecordedTerm("solver", SOLVER_LATENTS * ranks * total_bytes(dit.outputs[:1], most), "exact"),
        _working_term("denoise", recipe, preset, engines, ranks),
        RecordedTerm(cached, cache, "exact", "guided"),
        RecordedTerm(prompt, kept, "exact", "guided"),
    ]


def _decoding(recipe: Recipe, preset: Preset, engines: Path | None, ranks: int) -> Iterable[RecordedTerm]:
    family = family_of(preset)
    ranks = ranks if recipe.vae_ops == "library" else 1  # another decoder is the first rank's alone
    first, steady = (family.spec(preset, recipe, part_of(name, ranks)) for name in DECODER)
    known: Known = "exact" if recipe.vae_ops == "library" else "estimated"  # see formats/memory.py, which refines it
    frames = (preset.vae.stride[0], preset.height, preset.width, 3)
    own = total_bytes((steady.inputs[0], steady.outputs[0], first.inputs[0], first.outputs[0]))
    own += total_bytes(family.spec(preset, recipe, DECODER[1]).outputs[:1]) * (ranks > 1)  # frames, gathered
    terms = [
        decoder_weights(recipe, preset, engines),
        RecordedTerm(DECODER_CACHES, total_bytes(steady.inputs[1:]), known),
        RecordedTerm("decode buffers", own + staging_bytes("cuda", frames), "exact"),
        _working_term("decode", recipe, preset, engines, ranks),
    ]
    return [replace(term, when="decode") for term in terms]


def _apart(recipe: Recipe, preset: Preset) -> Iterable[RecordedTerm]:
    if preset.text.kind == "umt5":
        from longtake.training.models.text.umt5_paged import device_bytes

        yield RecordedTerm(
            "text encoder, at a new prompt", device_bytes(preset.text, "bf16", False), "estimated", "prompt"
        )
    if preset.text.kind == "gemma2":
        yield RecordedTerm("weights, Gemma", gemma_bytes(preset.text), "estimated")
    family = family_of(preset)
    first, steady = (family.spec(preset, recipe, f"vae_encoder_{step}") for step in ("first", "steady"))
    caches = 2 * total_bytes(steady.inputs[1:])
    weights = _parameters(preset, "vae_encoder_first") * 2
    taken = int(weights + caches + total_bytes(first.inputs))
    yield RecordedTerm("VAE encoder, before the start", taken, "estimated", "encode")


def gemma_bytes(text: TextEncoderConfig) -> int:
    """Of Gemma 2 in bf16, which stays on the GPU: heads of 256, half as many for keys and values, gated feed-forward."""
    attention = 256 * text.dim * 3 * text.heads  # q and out, k and v
    return 2 * (text.vocabulary * text.dim + text.layers * (attention + 3 * text.dim * text.ffn_dim))


def total_bytes(bindings: Iterable[Binding], most: Mapping[str, int] = NOTHING_VARIES) -> int:
    """Bytes of some bindings; a dynamic dimension (the slot table's, a chunk's frames) counts what `most` says of it."""
    return sum(DTYPES[b.dtype].bytes(prod(n if isinstance(n, int) else most[n] for n in b.shape)) for b in bindings)


def longest(spec: NetworkSpec) -> dict[str, int]:
    """The most that each dynamic dimension of a network may be."""
    return {name: most for name, (_, _, most) in spec.profile}


def state_bindings(spec: NetworkSpec) -> list[Binding]:
    """What a backend keeps of a network from call to call."""
    return [binding for binding in spec.inputs if binding.name in spec.kept.values()]


# ---- weights -----------------------------------------------------------------------------------------------------


def weights_term(recipe: Recipe, preset: Preset, name: str, engines: Path | None) -> RecordedTerm:
    """Bytes of one network's weights: from its built segments or plan, or worked out from the preset."""
    graph = graph_of(engines, name)
    if graph is not None:
        return RecordedTerm(f"weights, {name}", sum(_stored(graph, weight) for weight in graph.weights), "exact")
    plan = engines / f"{name}.plan" if engines else None
    if plan is not None and plan.is_file():
        return RecordedTerm(
            f"weights, {name}", plan.stat().st_size, "estimated"
        )  # a plan is its weights and little else
    return RecordedTerm(f"weights, {name}", weight_bytes(recipe, preset, name), "estimated")


def decoder_weights(recipe: Recipe, preset: Preset, engines: Path | None) -> RecordedTerm:
    """The decoder's weights: cut networks keep what both have in common once; each whole plan holds its own. Where the
    later steps stand for the first one, too, theirs are all (convolutions in codes have weights under other names)."""
    from longtake.runtime.backends.segments.vae_first import first_steps

    graphs = [graph for name in DECODER if (graph := graph_of(engines, name)) is not None]
    if len(graphs) == len(DECODER):
        graphs = graphs[1:] if first_steps(graphs[1]) else graphs
        stored = {weight: _stored(graph, weight) for graph in graphs for weight in graph.weights}
        return RecordedTerm("weights, VAE decoder", sum(stored.values()), "exact")
    terms = [weights_term(recipe, preset, name, engines) for name in DECODER]
    if engines is None and recipe.mode == "segmented":
        terms = terms[-1:]
    return RecordedTerm("weights, VAE decoder", sum(term.bytes for term in terms), "estimated")


def weight_bytes(recipe: Recipe, preset: Preset, name: str) -> int:
    """Bytes of a network's weights as `recipe` stores them: its linears in its precision, the rest in bf16."""
    linears = _linear_parameters(preset, name) if name in ("dit", "context") else 0
    coded, codes = _coded_parameters(preset) if name == DECODER[1] and recipe.vae_conv != "bf16" else (0, 0)
    return int(linears * stored_bytes(recipe.precision) + codes + (_parameters(preset, name) - linears - coded) * 2)


def graph_of(engines: Path | None, name: str) -> SegmentedGraph | None:
    """The cut network beside the plans, if it was cut."""
    path = engines / f"{name}.segments.json" if engines else None
    return SegmentedGraph.read(path) if path is not None and path.is_file() else None


def _stored(graph: SegmentedGraph, name: str) -> int:
    kind = graph.tensors[name]
    return DTYPES[kind.dtype].bytes(prod(int(n) for n in kind.shape))


@lru_cache
def _models(preset: Preset) -> dict[str, nn.Module]:
    """The preset's DiT and VAE without data."""
    family = family_of(preset)
    with torch.device("meta"):
        return {"dit": family.dit(preset), "vae": family.vae(preset)}


def _parameters(preset: Preset, name: str) -> int:
    """Weights that network `name` reads."""
    if name == "text_encoder":
        from longtake.training.models.text.words import text_encoder_for

        with torch.device("meta"):
            return sum(p.numel() for p in text_encoder_for(preset).parameters())
    models, network_of = _models(preset), family_of(preset).network_of
    if name.startswith("vae"):
        part = "encoder." if name.startswith("vae_encoder") else "decoder."
        return sum(p.numel() for n, p in models["vae"].named_parameters() if n.startswith(part))
    return sum(p.numel() for n, p in models["dit"].named_parameters() if network_of(n) == name)


def _coded_parameters(preset: Preset) -> tuple[int, int]:
    """Weights of the VAE decoder's convolutions that are kept as 8-bit codes, and these: more where they are folded."""
    from longtake.training.models.wan.vae_codes import CodedConv, codable

    vae: Any = _models(preset)["vae"]
    weights = [layer.weight for layer in codable(vae).values()]
    return sum(w.numel() for w in weights), sum(CodedConv(w, "fp8", 1.0).weight.numel() for w in weights)


def _linear_parameters(preset: Preset, name: str) -> int:
    """Weights of the linears that a recipe quantizes, in network `name`."""
    dit, family = _models(preset)["dit"], family_of(preset)
    wanted = [n for n in family.linears(dit) if family.network_of(n) == name]
    return sum(dit.get_parameter(f"{n}.weight").numel() for n in wanted)


# ---- memory of the executor --------------------------------------------------------------------------------------


def _working_term(lane: str, recipe: Recipe, preset: Preset, engines: Path | None, ranks: int) -> RecordedTerm:
    """What is passed between segments and what a plan or op wants while it runs, in one arena for networks that take
    turns: exact as far as the plans' manifests tell, or estimated."""
    sizes = [_network_working(recipe, engines, network, ranks) for network in LANES[lane]] if engines else []
    if found := [size for size in sizes if size is not None]:
        return RecordedTerm(WORKING[lane], max(found), "exact" if lane == "decode" else "estimated")
    estimate = _denoise_estimate if lane == "denoise" else _decode_estimate
    return RecordedTerm(WORKING[lane], estimate(recipe, preset, ranks), "estimated")


def _network_working(recipe: Recipe, engines: Path, network: str, ranks: int) -> int | None:
    """Arena bytes of a network among `engines`, of a rank's part where that is built: None if it is not there, or its plans do
    not say what they want."""
    from longtake.plugins.registry import op_named
    from longtake.runtime.backends.segments.arena import aligned
    from longtake.runtime.backends.segments.exchanges import exchange_bytes
    from longtake.runtime.backends.segments.planner import planned_steps
    from longtake.runtime.backends.segments.vae_first import first_steps

    graph = graph_of(engines, part_of(network, ranks)) or graph_of(engines, network)
    if graph is None:
        return scratch_of_plan(engines / f"{network}.plan")
    later = graph_of(engines, part_of(DECODER[1], ranks)) or graph_of(engines, DECODER[1])
    steady = later if network == DECODER[0] else None
    first = first_steps(steady) if steady else None  # the steady decoder's steps then stand for the first one's
    sizes = {
        s.name: scratch_of_plan(engines / f"{s.name}.plan") for s in (steady if first and steady else graph).segments
    }
    if any(size is None for size in sizes.values()):
        return None
    scratch = {name: aligned(size or 1) for name, size in sizes.items()}
    plan = first.plan if first else planned_steps(graph, scratch)
    ops = {
        i: _workspace(recipe, graph, i)
        for i, step in enumerate(plan.graph.steps)
        if step.kind == "op" and op_named(step.name).reads_table
    }
    ops |= {i: exchange_bytes(plan.graph, step) for i, step in enumerate(plan.graph.steps) if step.kind == "exchange"}
    return plan.layout(scratch, ops)[2]


def _workspace(recipe: Recipe, graph: SegmentedGraph, index: int) -> int:
    """What laying the attention's window out takes; a library's own workspace, some MB, is not known here."""
    from longtake.plugins.registry import op_named
    from longtake.plugins.shapes import dims_from_shapes
    from longtake.plugins.sink_attention import hopper, window

    step = graph.steps[index]
    shapes = [[n if isinstance(n, int) else 1 for n in graph.tensors[name].shape] for name in step.inputs]
    dims = dims_from_shapes(op_named(step.name).spec, shapes)
    if recipe.compute_capability != "9.0":
        return 0
    layout = hopper if recipe.attention == "fp8" else window
    return layout.addresses({**dims, "W": dims["S"]}, 0)[1]


def scratch_of_plan(plan: Path) -> int | None:
    """Bytes that a plan's context wants, as its manifest says; None if it does not."""
    from longtake.formats.plan import PlanManifest

    try:
        return PlanManifest.read(plan).scratch_bytes
    except LongtakeError:
        return None


def _denoise_estimate(recipe: Recipe, preset: Preset, ranks: int) -> int:
    """Tensors between segments, the FFN's inner ones (or the attention's window, which is less), unpacked weights. Of several
    ranks each has some of the tokens, of all of them some heads, and q, k and v once more while they travel."""
    dit, tokens = preset.dit, max(preset.frames_of(0), preset.chunk_latents) * preset.frame_tokens // ranks
    hidden = FFN_TENSORS_ALIVE * 2 * family_of(preset).widest(preset) // ranks
    if recipe.mode == "fused":
        return hidden
    rows = 2 * tokens * ((6 if ranks == 1 else 9) * dit.dim)  # q, k, v, the residual stream and what a segment hands on
    packed = recipe.precision in ("w4a16", "nvfp4")
    if recipe.linears == "library":  # step by step: the window laid out, or one inner tensor of the FFN and its weight
        inner = hidden // FFN_TENSORS_ALIVE + 2 * packed * dit.dim * dit.ffn_dim
        return rows + max(2 * preset.window_chunks * preset.chunk_tokens * 2 * dit.dim // ranks, inner)
    unpacked = 2 * _linear_parameters(preset, "dit") // dit.layers if packed else 0  # one block's
    return rows + unpacked + hidden


def _decode_estimate(recipe: Recipe, preset: Preset, ranks: int) -> int:
    """Multiples of the largest activation. At the last upsampling its input, the shortcut, both enlarged and their sum are
    alive. Of several ranks each has a share of the rows, and those of its neighbours that it reads. Where a
    library runs all but a few layers the steps are known; what is not is the scratch of those few."""
    if recipe.vae_ops == "library":
        rows = preset.latent_hw[0]
        return (
            _library_estimate(preset, recipe.vae_conv) * min(rows, -(-rows // ranks) + GHOST_ROWS * (ranks > 1)) // rows
        )
    return int(DECODER_TENSORS_ALIVE * 2 * family_of(preset).largest(preset))


@lru_cache
def _library_estimate(preset: Preset, vae_conv: str) -> int:
    from longtake.runtime.backends.segments.planner import planned_steps
    from longtake.runtime.backends.segments.vae_first import first_steps
    from longtake.runtime.budget.recorded_steps import library_decoder_steps

    graph = library_decoder_steps(preset, vae_conv)
    scratch = {segment.name: 0 for segment in graph.segments}
    first = first_steps(graph)
    return max(plan.layout(scratch)[2] for plan in (planned_steps(graph, scratch), *([first.plan] if first else [])))
