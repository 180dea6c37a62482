"""The first step of a video stream by the ops, engines and weights of the later ones (`vae_ops: library`).

A stream's first latent stands for one frame, so what doubles the frames is left out: the 3x1x1 convolution that makes two
of one, with its history, which stays zeros. All else is the later step over caches of zeros, at one frame a layer. So
the network `vae_first`, which holds the decoder once more, is neither loaded nor run: its engine wants every weight
turned back into TensorRT's order (1.08 GB for the 5B model's decoder) and scratch of its own.

Two ops and the last segment are made for more frames than there are: the shortcut `duplicate_up_time` gives two, of which
the second is kept, and the segment gets zeros for the frames to come, and its first frame is the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtake.formats.segmented_graph import SegmentedGraph, Step
from longtake.plugins.registry import op_named
from longtake.runtime.backends.segments.arena import Inside, aliases_of, storage_bytes
from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.backends.segments.planner import PlannedSteps, has_convolutions, shared

BY_OPS = True  # False: the network `vae_first` of the recipe runs, as it was built
WHOLE = "frames of a later step"
DOUBLES_FRAMES = (3, 1, 1)  # the kernel of the convolution that makes two frames of one


@dataclass(frozen=True)
class FirstSteps:
    """plan: the steps; its outputs are the new caches, and the frame is the first one of tensor WHOLE [1,3,T,H,W].
    frames: name of the output that the frame goes to. caches: (output, input) of each. tail: the tensor that the last
    segment reads, and from which of its frames on it must be zeros. head: that step's number."""

    plan: PlannedSteps
    frames: str
    caches: tuple[tuple[str, str], ...]
    tail: tuple[str, int]
    head: int


def first_steps(steady: SegmentedGraph) -> FirstSteps | None:
    """The first step by those of `steady`, as exported; None if its layers are not ops."""
    return _Shortening(steady).result() if BY_OPS and has_convolutions(steady) else None


class _Shortening:
    """Goes through a later step's steps and keeps track of what each of its tensors is called, at one frame a layer."""

    def __init__(self, steady: SegmentedGraph) -> None:
        self.steady, self.steps = steady, list[Step]()
        self.tensors, self.inside = dict(steady.tensors), dict[str, Inside]()
        self.skipped: dict[str, str] = {}  # what is left out -> what comes in its place
        self.tail: tuple[str, int] | None = None
        self.exact = True  # whether every frame that is part of something begins where a tensor may

    def result(self) -> FirstSteps | None:
        head = len(self.steady.steps) - 1
        for i, step in enumerate(self.steady.steps):
            step = replace(step, inputs=tuple(self.skipped.get(name, name) for name in step.inputs))
            if step.kind == "segment":
                if i == head:
                    step = self._last(step)
                elif any(self.tensors[n] != self.steady.tensors[n] for n in step.inputs):
                    return None  # made for other sizes
                self.steps.append(step)
            elif step.kind == "exchange":
                self._exchange(step)
            elif not self._op(step):
                return None
        if self.tail is None or not self.exact:
            return None
        caches = {out: source for step in self.steps for out, source in aliases_of(step).items()}
        known = {*self.steady.inputs, *self.steady.outputs}
        ops = (step for step in self.steady.steps if step.kind == "op")
        pairs = tuple((out, source) for op in ops for out, source in aliases_of(op).items() if out in known)
        kept = {name for step in self.steps for name in (*step.inputs, *step.outputs)}
        outputs = tuple(out for out in self.steady.outputs if out in caches)
        frames = next(name for name in self.steady.outputs if name not in dict(pairs))
        inputs = tuple(name for name in self.steady.inputs if name in kept)
        weights = tuple(name for name in self.steady.weights if name in kept)
        names = kept | {place.other for place in self.inside.values()} | set(self.inside)
        graph = replace(
            self.steady, network="vae_first", inputs=inputs, outputs=outputs, weights=weights, steps=tuple(self.steps),
            tensors={name: self.tensors[name] for name in sorted(names)},
        )  # fmt: skip
        return FirstSteps(shared(PlannedSteps(graph, self.inside)), frames, pairs, self.tail, head=len(self.steps) - 1)

    def _exchange(self, step: Step) -> None:
        """Add an exchange of rows, at as many frames as there are."""
        for out in step.outputs:
            self._sized(out, int(self.tensors[step.inputs[0]].shape[0]))
        self.steps.append(step)

    def _op(self, step: Step) -> bool:
        """Add a custom op at one frame, unless it is left out; False if it is none that this file knows."""
        if step.kind != "op":
            return False
        x, out, op = step.inputs[0], step.outputs[0], op_named(step.name)
        if op.extends_stream:
            if self._doubles(out):
                self.skipped[out] = x
                return True
            self._sized(out, 1 + int(self.tensors[step.inputs[-1]].shape[0]))
        elif op.kernel_size == DOUBLES_FRAMES:
            self.skipped[out] = x  # x is what stands for the extended stream
            return True
        elif op.kernel_size:
            self._sized(out, int(self.tensors[x].shape[0]) - op.kernel_size[0] + 1)
        elif op.first_frame:
            step = replace(step, name=op.first_frame)
            self._sized(out, 1)
        elif op.of_frames and op.doubles_frames:
            step = replace(step, inputs=(x, self._second_of_two(step.inputs[1])), outputs=(self._second_of_two(out),))
        else:
            return False
        self.steps.append(step)
        return True

    def _doubles(self, name: str) -> bool:
        """Whether an extended stream goes into the convolution that makes two frames of one."""
        readers = (step for step in self.steady.steps if step.kind == "op" and step.inputs[0] == name)
        return any(op_named(step.name).kernel_size == DOUBLES_FRAMES for step in readers)

    def _sized(self, name: str, frames: int) -> None:
        kind = self.tensors[name]
        self.tensors[name] = replace(kind, shape=(frames, *kind.shape[1:]))

    def _second_of_two(self, name: str) -> str:
        """A tensor of two frames, whose second one is `name`."""
        both = f"{name}, doubled"
        kind = self.steady.tensors[name]
        self.tensors[both] = replace(kind, shape=(2, *kind.shape[1:]))
        self._sized(name, 1)
        offset = storage_bytes(self.tensors[both]) // 2
        self.exact &= offset == storage_bytes(self.tensors[name])
        self.inside[name] = Inside(both, offset, part=True)
        return both

    def _last(self, step: Step) -> Step:
        """The segment at the end reads a stream as long as it is made for."""
        x = next(name for name in step.inputs if self.tensors[name] != self.steady.tensors[name])
        long = f"{x}, and frames to come"
        self.tensors[long], self.inside[x] = self.steady.tensors[x], Inside(long, part=True)
        self.tail = long, int(self.tensors[x].shape[0])
        (made,) = step.outputs
        self.tensors[WHOLE] = self.steady.tensors[made]
        return replace(step, inputs=tuple(long if name == x else name for name in step.inputs), outputs=(WHOLE,))


class FirstStep(SegmentedNetwork):
    """Takes what `vae_first` does: the latent, the frame and the new caches, by name."""

    def __init__(self, steady: SegmentedNetwork, first: FirstSteps) -> None:
        self.first = first
        super().__init__(
            steady.host, first.plan.graph, steady.arena, engines=steady.engines, exchanges=steady.exchanges
        )
        self._fixed |= {name: steady._fixed[name] for name in self.graph.weights}
        self._compiled = steady._compiled

    def _planned(self, graph: SegmentedGraph) -> PlannedSteps:
        return self.first.plan

    def values_for(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See SegmentedNetwork.values_for; each cache is both the old one and the new one."""
        return super().values_for(tensors) | {source: tensors[out] for out, source in self.first.caches}

    @torch.no_grad()
    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        """See SegmentedNetwork.run."""
        values = self.values_for(tensors)
        for out, _ in self.first.caches:
            tensors[out].zero_()
        name, first = self.first.tail
        for i, step in enumerate(self.graph.steps):
            if i == self.first.head:
                values[name][first:].zero_()
            self.run_step(i, step, values, write)
        frames = tensors[self.first.frames]
        frames.copy_(values[WHOLE][:, :, : frames.shape[2]])
