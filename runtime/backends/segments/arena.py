"""Where what a cut network makes on the way lies in its arena: offsets that are known before anything is allocated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from longtake.dtypes import DTYPES
from longtake.formats.segmented_graph import SegmentedGraph, Step, TensorType
from longtake.plugins.registry import op_named

ALIGNMENT = 256  # bytes, what TensorRT asks of a binding's address
ATTEMPTS = 12  # at placing the pieces, one after the other; each takes milliseconds


def storage_bytes(kind: TensorType) -> int:
    """Bytes of a tensor, rounded up to ALIGNMENT."""
    return aligned(DTYPES[kind.dtype].bytes(prod(int(n) for n in kind.shape)))


def aligned(size: int) -> int:
    """`size` bytes, at least one, rounded up to ALIGNMENT."""
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Inside:
    """Where a tensor lies beside another: it begins `offset` bytes from where `other` begins, perhaps before it.

    part: it is a stretch of `other`, which is wanted as long as any of its parts is. Otherwise each is wanted for itself,
    and where both are wanted at once a step reads one before it writes the other.
    """

    other: str
    offset: int = 0
    part: bool = False


def memory_layout(
    graph: SegmentedGraph,
    given: Collection[str],
    scratch: Sequence[int] = (),
    inside: Mapping[str, Inside] | None = None,
) -> tuple[dict[str, int], list[int], int]:
    """Byte offsets of all tensors made on the way and of each step's scratch, and the arena's size; memory is reused
    after the last reader, scratch after its step: the step that wants most need not be the one when most is kept.

    Args:
        scratch: bytes that each step wants while it runs; by default none wants any.
        inside: tensors whose place follows from another's.

    Tensors in `given` (inputs, outputs, weights) and outputs written over an input need no place; a view has the place
    of what it shows, which is kept until both have been read.
    """
    inside = views_of(graph) | dict(inside or {})
    pieces = pieces_of(graph, given, inside)
    pieces += [Piece(i, aligned(size), i, i) for i, size in enumerate(scratch) if size]
    found, end = placed(pieces)
    offsets = {name: offset for name, offset in found.items() if isinstance(name, str)}
    for name in inside:
        whole, shift = _whole(name, inside)
        if name not in offsets and whole in offsets:
            offsets[name] = offsets[whole] + shift
    return offsets, [found.get(i, 0) for i in range(len(scratch))], end


def views_of(graph: SegmentedGraph) -> dict[str, Inside]:
    """Every view, as a part of what it shows."""
    return {step.outputs[0]: Inside(step.inputs[0], part=True) for step in graph.steps if step.kind == "view"}


def pieces_of(graph: SegmentedGraph, given: Collection[str], inside: Mapping[str, Inside]) -> list[Piece]:
    """What needs a place of its own, and from which step to which; parts count as what they are part of."""
    written_over = {name for step in graph.steps if step.kind != "view" for name in aliases_of(step)}
    uses: dict[str, list[int]] = defaultdict(list)
    for i, step in enumerate(graph.steps):
        for name in (*step.inputs, *step.outputs):
            whole = _whole(name, inside)[0]
            if whole not in given and whole not in written_over:
                uses[whole].append(i)
    pieces = []
    for name, steps in uses.items():
        group, shift = _anchor(name, inside)
        pieces.append(Piece(name, storage_bytes(graph.tensors[name]), min(steps), max(steps), group, shift))
    return pieces


def _whole(name: str, inside: Mapping[str, Inside]) -> tuple[str, int]:
    """What `name` is part of, and where in it."""
    shift = 0
    while name in inside and inside[name].part:
        shift += inside[name].offset
        name = inside[name].other
    return name, shift


def _anchor(name: str, inside: Mapping[str, Inside]) -> tuple[str, int]:
    """The tensor that the place of `name` follows from in the end, and how far behind it that is."""
    shift = 0
    while name in inside:
        shift += inside[name].offset
        name = inside[name].other
    return name, shift


@dataclass(frozen=True)
class Piece:
    """Memory that is wanted from step `first` to step `last`: a tensor by name, or a step's scratch by its number.

    group: pieces of one group move together, each `shift` bytes from where the group is put; by default it is alone.
    """

    name: str | int
    size: int
    first: int
    last: int
    group: str | None = None
    shift: int = 0

    def meets(self, other: Piece) -> bool:
        """Whether there is a step in which both are wanted."""
        return self.first <= other.last and other.first <= self.last


def placed(pieces: Sequence[Piece]) -> tuple[dict[str | int, int], int]:
    """Byte offsets by name, and the end: the largest first, each as low as those allow that it meets. Placing them in the
    order they come up leaves gaps that a large one does not fit (12 % more for the VAE decoder's). What ends up highest
    goes first in the next of some attempts, of which the smallest counts.
    """
    groups: dict[str | int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.name if piece.group is None else piece.group].append(piece)
    order = sorted(groups.values(), key=lambda group: (-_extent(group), min(p.first for p in group)))
    least = max((p.size for p in pieces), default=0)
    best: tuple[dict[str | int, int], int] | None = None
    for _ in range(ATTEMPTS):
        found = _placed_in_order(order)
        if best is None or found[1] < best[1]:
            best = found
        if best[1] <= least:
            break
        highest = max(order, key=lambda group: max(found[0][p.name] + p.size for p in group))
        order = [highest, *(group for group in order if group is not highest)]
    assert best is not None
    return best


def _extent(group: Sequence[Piece]) -> int:
    return max(p.shift + p.size for p in group) - min(p.shift for p in group)


def _placed_in_order(groups: Iterable[Sequence[Piece]]) -> tuple[dict[str | int, int], int]:
    offsets: dict[str | int, int] = {}
    done: list[Piece] = []
    for group in groups:
        # The group may begin anywhere but strictly between these.
        pairs = [(p, q, offsets[q.name]) for p in group for q in done if p.meets(q)]
        taken = [(at - p.shift - p.size, at + q.size - p.shift) for p, q, at in pairs]
        begin = -min(p.shift for p in group)
        for start, stop in sorted(taken):
            if start >= begin:
                break
            begin = max(begin, stop)
        offsets |= {p.name: begin + p.shift for p in group}
        done += group
    return offsets, max((offsets[p.name] + p.size for p in done), default=0)


def step_scratch(graph: SegmentedGraph, segments: Mapping[str, int], ops: Mapping[int, int]) -> list[int]:
    """Scratch bytes of each step, from those of the segments by name and of the others by step; one segment's contexts
    are given as much wherever they run."""
    return [segments[step.name] if step.kind == "segment" else ops.get(i, 0) for i, step in enumerate(graph.steps)]


def aliases_of(step: Step) -> dict[str, str]:
    """Outputs of a step that are written over one of its inputs."""
    if step.kind in ("segment", "exchange"):
        return {}
    if step.kind == "view":
        return {step.outputs[0]: step.inputs[0]}
    return {step.outputs[out]: step.inputs[source] for out, source in op_named(step.name).spec.aliases}
