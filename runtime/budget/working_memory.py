"""What a VAE decoder's working memory is made of: the tensors that lie in the arena in its fullest steps.

  longtake budget memory --recipe wan2.2-ti2v-5b_w4a16_sm90 --network vae_first

Without engines the scratch of the few plans is not known and counts as nothing. Needs no GPU and no weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe, recipe_named
from longtake.formats.segmented_graph import SegmentedGraph
from longtake.options import Command, OneOf, option
from longtake.runtime.backends.segments.arena import Piece, aligned, pieces_of, views_of
from longtake.runtime.backends.segments.planner import PlannedSteps, planned_steps
from longtake.runtime.backends.segments.vae_first import first_steps
from longtake.runtime.budget.recorded_steps import library_decoder_steps
from longtake.runtime.budget.terms import graph_of, scratch_of_plan


def steady_graph(recipe: Recipe, engines: Path | None) -> SegmentedGraph:
    """`vae_steady` of a recipe, from its engines if they are built. Raises LongtakeError if its layers are no ops."""
    if (graph := graph_of(engines, "vae_steady")) is not None:
        return graph
    if recipe.vae_ops != "library":
        raise LongtakeError(f"recipe {recipe.name}: its VAE is not known step by step", got=f"vae_ops: {recipe.vae_ops}",
                            expected="vae_ops: library", fix="name built engines: --engines FOLDER")  # fmt: skip
    return library_decoder_steps(recipe.model, recipe.vae_conv)


def fullest_steps(plan: PlannedSteps, scratch: dict[str, int]) -> Iterator[tuple[int, int, list[Piece]]]:
    """(bytes in use, step, what lies there), the fullest step first; memory that two share counts once."""
    graph = plan.graph
    given = {*graph.inputs, *graph.outputs, *graph.weights}
    offsets, _, _ = plan.layout(scratch)
    pieces = pieces_of(graph, given, views_of(graph) | plan.inside)
    rows = []
    for i, step in enumerate(graph.steps):
        alive = sorted((p for p in pieces if p.first <= i <= p.last), key=lambda p: offsets[str(p.name)])
        used, end = scratch.get(step.name, 0) if step.kind == "segment" else 0, 0
        for piece in alive:
            start, stop = offsets[str(piece.name)], offsets[str(piece.name)] + piece.size
            used, end = used + max(0, stop - max(start, end)), max(end, stop)
        rows.append((used, i, alive))
    yield from sorted(rows, key=lambda row: -row[0])


def report(plan: PlannedSteps, scratch: dict[str, int], count: int) -> Iterator[str]:
    """Lines for people."""
    offsets, _, size = plan.layout(scratch)
    yield f"arena {size / 1e6:.1f} MB, {len(plan.graph.steps)} steps; scratch of plans {max(scratch.values()) / 1e6:.1f} MB at most"
    for used, i, alive in list(fullest_steps(plan, scratch))[:count]:
        step = plan.graph.steps[i]
        yield f"step {i:3} {step.name}: {used / 1e6:.1f} MB in use"
        for piece in alive:
            shape = "x".join(map(str, plan.graph.tensors[str(piece.name)].shape))
            place = offsets[str(piece.name)] / 1e6
            yield f"    {place:8.1f} to {place + piece.size / 1e6:8.1f}  {piece.size / 1e6:7.1f} MB  {shape:20} {piece.name}, steps {piece.first} to {piece.last}"  # noqa: E501


@dataclass(frozen=True)
class MemoryOptions:
    """What"""

    recipe: str = option(metavar="NAME")
    """a shipped recipe or a .yaml file"""
    engines: Path | None = option(None, metavar="FOLDER")
    """built engines (default: none, and nothing is known of their scratch)"""
    network: Annotated[str, OneOf(("vae_steady", "vae_first"))] = option("vae_steady")
    """of which decoder"""
    plain: bool = option(False)
    """the steps as exported"""
    steps: int = option(3, metavar="N")
    """how many of the fullest are shown"""


def run(options: MemoryOptions) -> int:
    """Print the report."""
    engines = options.engines
    graph = steady_graph(recipe_named(options.recipe), engines)
    known = {s.name: scratch_of_plan(engines / f"{s.name}.plan") if engines else 0 for s in graph.segments}
    scratch = {name: aligned(size or 1) for name, size in known.items()}
    plan = PlannedSteps(graph) if options.plain else planned_steps(graph, scratch)
    if options.network == "vae_first":
        found = first_steps(graph)
        if found is None:
            raise LongtakeError("the first step is a network of its own here", fix="leave out --network")
        plan = found.plan
    sys.stdout.write("\n".join(report(plan, scratch, options.steps)) + "\n")
    return 0


COMMAND = Command(run=run, options=(MemoryOptions,), description=__doc__ or "")
