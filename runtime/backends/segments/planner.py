"""Steps of a cut network that take less memory at once, and compute the same: for networks whose convolutions are ops.

Three things, all of which only touch tensors between steps (T frames, a pane is a frame of a tensor):
* An op that allows it writes over an input that nobody reads after it (`OpSpec.may_share`). A shortcut's 1x1x1
  convolution moves before such an op, lest it be what keeps the input alive.
* Upsampling, four times as large as what it reads, and the 1x3x3 convolution behind it go frame by frame.
* A 3x3x3 convolution goes part by part: output frames t reads frames t to t + 2, so what earlier parts have read is
  over, and the output, whose panes are no larger, follows behind in the same memory. Only what a part has written, and
  never what it reads, is overwritten while it runs.
The last two cost launches, so they are done only where that makes the whole smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from longtake.dtypes import DTYPES
from longtake.formats.segmented_graph import SegmentedGraph, Step, TensorType
from longtake.plugins.registry import op_named
from longtake.runtime.backends.segments.arena import (
    ALIGNMENT,
    Inside,
    aliases_of,
    memory_layout,
    step_scratch,
    storage_bytes,
    views_of,
)

SHARE = True  # False: every output in memory of its own (2,768 MB for the 5B decoder at 1280x704, SPLIT False as well)
SPLIT = True  # False: every step as a whole (2,307 MB for that decoder; True: 1,961 MB)
WORTH = 0.97  # what smaller parts must bring the arena down to, at least, to be taken instead


@dataclass(frozen=True)
class PlannedSteps:
    """A network's steps, and what of its tensors lies beside what (see `memory_plan.Inside`)."""

    graph: SegmentedGraph
    inside: dict[str, Inside] = field(default_factory=dict)

    def layout(self, scratch: Mapping[str, int], ops: Mapping[int, int] | None = None) -> tuple[dict[str, int], list[int], int]:  # fmt: skip
        """`memory_layout`, with scratch bytes of the segments by name and of the ops by step."""
        graph = self.graph
        given = {*graph.inputs, *graph.outputs, *graph.weights}
        return memory_layout(graph, given, step_scratch(graph, scratch, ops or {}), self.inside)


def planned_steps(graph: SegmentedGraph, scratch: Mapping[str, int]) -> PlannedSteps:
    """The steps of `graph` in the form that wants the smallest arena, as far as this file knows how.

    Args:
        scratch: bytes that each segment wants while it runs, by name.
    """
    if not has_convolutions(graph):
        return PlannedSteps(graph)
    plain = PlannedSteps(_shortcuts_first(graph) if SHARE else graph)

    def variant(indices: Iterable[int], parts: int) -> tuple[PlannedSteps, int]:
        found = shared(split(plain, indices, parts))
        return found, found.layout(scratch)[2]

    chosen, parts = list[int](), 0
    best, size = variant(chosen, parts)
    alive = bytes_alive(plain)
    able = sorted((i for i in range(len(alive)) if SPLIT and _splits(plain.graph, i)), key=lambda i: -alive[i])
    for count in range(1, len(able) + 1):  # those at which most is alive, ever more of them
        for tried in (2, 0):
            found, wanted = variant(able[:count], tried)
            if wanted < WORTH * size:
                best, size, chosen, parts = found, wanted, able[:count], tried
    for i in list(chosen):
        found, wanted = variant(fewer := [j for j in chosen if j != i], parts)
        if wanted <= size:
            best, size, chosen = found, wanted, fewer
    return best


def has_convolutions(graph: SegmentedGraph) -> bool:
    """Whether convolutions are ops, rather than parts of segments."""
    return any(_kernel_size(step) for step in graph.steps)


def _kernel_size(step: Step) -> tuple[int, ...]:
    return op_named(step.name).kernel_size if step.kind == "op" else ()


def bytes_alive(plan: PlannedSteps) -> list[int]:
    """Bytes of the tensors that are alive in each step, as if none shared memory."""
    graph, last = plan.graph, _last_use(plan.graph)
    given = {*graph.inputs, *graph.outputs, *graph.weights}
    first = {
        name: i for i, step in reversed(list(enumerate(graph.steps))) for name in step.outputs if name not in given
    }

    def alive(step: int) -> int:
        return sum(storage_bytes(graph.tensors[n]) for n, i in first.items() if i <= step <= last[n])

    return [alive(step) for step in range(len(graph.steps))]


def _last_use(graph: SegmentedGraph) -> dict[str, int]:
    return {name: i for i, step in enumerate(graph.steps) for name in (*step.inputs, *step.outputs)}


# ---- outputs over inputs -----------------------------------------------------------------------------------------


def _shortcuts_first(graph: SegmentedGraph) -> SegmentedGraph:
    """1x1x1 convolutions before the first step that could take their input's memory over."""
    steps = list(graph.steps)
    for step in [s for s in steps if _kernel_size(s) == (1, 1, 1)]:
        at = steps.index(step)
        for i, other in enumerate(steps[:at]):
            if other.kind == "op" and any(
                other.inputs[source] == step.inputs[0] for _, source in op_named(other.name).spec.may_share
            ):
                steps.insert(i, steps.pop(at))
                break
    return replace(graph, steps=tuple(steps))


def shared(plan: PlannedSteps) -> PlannedSteps:
    """`plan` with inputs in the end of those outputs that may share memory with them, where they end there."""
    if not SHARE:
        return plan
    graph, inside = plan.graph, dict(plan.inside)
    apart = {*graph.inputs, *graph.outputs, *graph.weights, *views_of(graph)}
    apart |= {name for step in graph.steps for name in aliases_of(step)}
    whole = {part: place.other for part, place in inside.items() if place.part}
    last: dict[str, int] = {}
    for i, step in enumerate(graph.steps):
        last |= dict.fromkeys((whole.get(n, n) for n in (*step.inputs, *step.outputs)), i)
    shown = {place.other for place in views_of(graph).values()}
    for i, step in enumerate(graph.steps):
        for output, source in op_named(step.name).spec.may_share if step.kind == "op" else ():
            x, out = step.inputs[source], step.outputs[output]
            if {x, out} & apart or x in inside or out in whole or x in shown:
                continue
            offset = storage_bytes(graph.tensors[out]) - storage_bytes(graph.tensors[x])
            exact = _exact(graph.tensors[x]) and _exact(graph.tensors[out]) and offset >= 0
            if exact and last[x] == i and step.inputs.count(x) == 1:
                inside[x] = Inside(out, offset)
    return PlannedSteps(graph, inside)


def _exact(kind: TensorType) -> bool:
    """Whether a tensor ends where its memory does."""
    return _bytes(kind.dtype, kind.shape) % ALIGNMENT == 0


def _bytes(dtype: str, shape: Iterable[int | str]) -> int:
    """Bytes of a stream's tensor, or of a part of it."""
    return DTYPES[dtype].bytes(prod(int(n) for n in shape))


def _pane(kind: TensorType) -> int:
    """Bytes of a frame."""
    return _bytes(kind.dtype, kind.shape[1:])


STREAMS = ("bf16", "int8")  # what a stream's frames are, numbers or codes


# ---- steps in parts ----------------------------------------------------------------------------------------------


def _splits(graph: SegmentedGraph, i: int) -> bool:
    """Whether step `i` can go in parts: upsampling with the convolution behind it, or a 3x3x3 convolution."""
    step = graph.steps[i]
    given = {*graph.inputs, *graph.outputs, *graph.weights}
    if step.kind != "op" or not op_named(step.name).splits_by_frame or {step.inputs[0], step.outputs[0]} & given:
        return False
    x, out = (graph.tensors[n] for n in (step.inputs[0], step.outputs[0]))
    if x.dtype not in STREAMS or out.dtype not in STREAMS or any(_pane(t) % ALIGNMENT for t in (x, out)):
        return False
    readers = [j for j, s in enumerate(graph.steps) if step.outputs[0] in s.inputs]
    if op_named(step.name).repeats:
        follows = readers == [i + 1] and _kernel_size(graph.steps[i + 1]) == (1, 3, 3)
        made = graph.tensors[graph.steps[i + 1].outputs[0]] if follows else out
        fits = int(x.shape[0]) > 1 and _pane(made) % ALIGNMENT == 0
        return follows and fits and graph.steps[i + 1].outputs[0] not in given
    narrower = _pane(out) <= _pane(x)
    return int(out.shape[0]) > 1 and narrower and _last_use(graph)[step.inputs[0]] == i


def split(plan: PlannedSteps, indices: Iterable[int], parts: int) -> PlannedSteps:
    """`plan` with these steps in parts: upsampling a frame of its input at a time, 3x3x3 convolutions in `parts`, or
    where that does not divide their frames, or is 0, in as many as there are frames."""
    tensors, inside, steps = dict(plan.graph.tensors), dict(plan.inside), []
    wanted, skipped = set(indices), set[int]()
    for i, step in enumerate(plan.graph.steps):
        if i in skipped:
            continue
        if i not in wanted:
            steps.append(step)
        elif op_named(step.name).repeats:
            steps += _upsampled_by_frames(tensors, inside, step, plan.graph.steps[i + 1])
            skipped.add(i + 1)
        else:
            frames = int(tensors[step.outputs[0]].shape[0])
            count = parts if parts and frames % parts == 0 else frames
            steps += _convolved_in_parts(tensors, inside, step, frames // count)
    return PlannedSteps(replace(plan.graph, tensors=tensors, steps=tuple(steps)), inside)


def _stretch(tensors: dict[str, TensorType], inside: dict[str, Inside], name: str, first: int, count: int) -> str:
    """The name of frames `first` to `first + count` of a tensor, as a tensor."""
    part, kind = f"{name}[{first}:{first + count}]", tensors[name]
    tensors[part] = replace(kind, shape=(count, *kind.shape[1:]))
    inside[part] = Inside(name, first * _pane(kind), part=True)
    return part


def _upsampled_by_frames(tensors: dict[str, TensorType], inside: dict[str, Inside], up: Step, conv: Step) -> list[Step]:
    steps, rate = [], op_named(up.name).repeats
    for frame in range(int(tensors[up.inputs[0]].shape[0])):
        wide = f"{up.outputs[0]}[{frame * rate}:{(frame + 1) * rate}]"  # for itself: the whole is never there
        tensors[wide] = replace(tensors[up.outputs[0]], shape=(rate, *tensors[up.outputs[0]].shape[1:]))
        x = _stretch(tensors, inside, up.inputs[0], frame, 1)
        out = _stretch(tensors, inside, conv.outputs[0], frame * rate, rate)
        steps += [
            replace(up, inputs=(x,), outputs=(wide,)),
            replace(conv, inputs=(wide, *conv.inputs[1:]), outputs=(out,)),
        ]
    return steps


def _convolved_in_parts(
    tensors: dict[str, TensorType], inside: dict[str, Inside], conv: Step, frames: int
) -> list[Step]:
    """`frames` of the output at a time; it begins so far before x that each part ends where its own x begins, or sooner."""
    x, out = conv.inputs[0], conv.outputs[0]
    inside[out] = Inside(x, -frames * _pane(tensors[out]))
    past, steps = int(tensors[x].shape[0]) - int(tensors[out].shape[0]), []
    for first in range(0, int(tensors[out].shape[0]), frames):
        read = _stretch(tensors, inside, x, first, frames + past)
        made = _stretch(tensors, inside, out, first, frames)
        steps.append(replace(conv, inputs=(read, *conv.inputs[1:]), outputs=(made,)))
    return steps
