"""A network taken apart where codes are chosen: each part is given the same numbers in PyTorch and in the exported view.

Two correct ways of computing differ in the last bits of fp32. A value on the edge between two 4-bit codes then goes
either way, and all that follows is another number: of an untrained or hardly trained model by a tenth and more. So the
whole network's error says little about the graph. Here the view is opened at the input of every quantized Linear, of
every block and of every attention. What PyTorch had there is fed on both sides, nothing is carried on, and what is left
is fp32's own rounding. A wrong weight, scale, clamp or wire shows at its full size, whatever the model has learnt.

Each case runs three times: with numbers as they come, far beyond the calibrated range (so that every clamp acts), and
near nothing (so that every eps counts). A network in which no codes are chosen is compared whole with numbers as they
come, and opened for the other two: at the inputs of its LayerNorms and the outputs of its convolutions.

Legend: C channels, the last dimension.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from longtake.accuracy.layers import BLOCK, layer_tensors, module_name
from longtake.accuracy.runners import Feeds, ViewRunner, submodule
from longtake.formats.onnx_file import read_onnx

QUANTIZED = re.compile(r"\.q\d+\.bf16$")  # a Gemm's input "x.q0.bf16" is the quantized "x"
COMPUTED = ".computed"
HEAD = "head"
WRITES, READS = "kv_cache_write", "sink_attention"
# How inputs are scaled: those of linears and blocks, and those of attentions (queries far out would make of a softmax
# a choice that the last bit decides).
SCALES = {"": (1.0, 1.0), ", far out": (8.0, 1.0), ", near nothing": (1e-3, 1e-3)}


@dataclass(frozen=True)
class Points:
    """Where a view is opened. inputs: module -> the tensor that it is given first. attention: (q, k, v) of each layer.
    outputs: module -> the tensor that it makes."""

    inputs: dict[str, str]
    attention: tuple[tuple[str, str, str], ...] = ()
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> list[str]:
        attention = (name for layer in self.attention for name in layer)
        return list(dict.fromkeys([*self.inputs.values(), *self.outputs.values(), *attention]))

    def label(self, tensor: str) -> str:
        """What a tensor is called in a table."""
        for module, name in self.inputs.items():
            if name == tensor:
                return f"input of {module}"
        for module, name in self.outputs.items():
            if name == tensor:
                return f"output of {module}"
        layer, which = next((i, qkv.index(tensor)) for i, qkv in enumerate(self.attention) if tensor in qkv)
        return f"{'qkv'[which]} of attention {layer}"


def points_of(view: onnx.ModelProto, graph: onnx.ModelProto, linears: Collection[str]) -> Points | None:
    """Where to open `view` of `graph`, of whose modules `linears` are quantized; None where not all of that is found."""
    gemms = ((module_name(n.input[1]), n) for n in view.graph.node if n.op_type == "Gemm" and len(n.input) > 1)
    inputs = {name: QUANTIZED.sub("", node.input[0]) for name, node in gemms if name is not None and name in linears}
    writes = [n for n in graph.graph.node if n.op_type.startswith(WRITES)]
    reads = [n for n in graph.graph.node if n.op_type.startswith(READS)]
    ends = {name: tensor for name, tensor in layer_tensors(view).items() if BLOCK.fullmatch(name)}
    if len(writes) != len(reads) or len(ends) != len(reads) or not inputs:
        return None
    for i in range(len(ends)):
        inputs[f"blocks.{i + 1}" if i + 1 < len(ends) else HEAD] = ends[f"blocks.{i}"]
    points = Points(inputs, tuple((read.input[0], read.input[1], read.input[2]) for read in reads))
    made = {name for node in view.graph.node for name in node.output}
    same = all(sorted(write.input[:2]) == sorted(read.input[1:3]) for write, read in zip(writes, reads))
    return points if same and made.issuperset(points.tensors) else None


def plain_points(view: onnx.ModelProto) -> tuple[Points, onnx.ModelProto]:
    """Where to open a view in which no codes are chosen, and that view: modules whose weight one node alone reads.

    What a LayerNorm reads is made a tensor of its own there: the residual goes on with another.
    """
    readers = Counter(name for node in view.graph.node for name in node.input)
    model, norms, convs = onnx.ModelProto(), {}, {}
    model.CopyFrom(view)
    del model.graph.node[:]
    for node in view.graph.node:
        module = module_name(node.input[1]) if len(node.input) > 1 and readers[node.input[1]] == 1 else None
        added = model.graph.node.add()
        if module and node.op_type == "LayerNormalization":
            norms[module] = f"{node.output[0]}.normed"
            added.CopyFrom(helper.make_node("Identity", [node.input[0]], [norms[module]]))
            added = model.graph.node.add()
        added.CopyFrom(node)
        if module and node.op_type == "LayerNormalization":
            added.input[0] = norms[module]
        elif module and node.op_type == "Conv":
            convs[module] = node.output[0]
    return Points(norms, (), convs), model


def opened(view: onnx.ModelProto, tensors: list[str]) -> onnx.ModelProto:
    """A copy of `view` that is fed `tensors`, and gives what it would have computed for them as "NAME.computed"."""
    model = onnx.ModelProto()
    model.CopyFrom(view)
    wanted = set(tensors)
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name in wanted:
                node.output[i] = name + COMPUTED
    for name in tensors:
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        model.graph.output.append(helper.make_tensor_value_info(name + COMPUTED, TensorProto.FLOAT, None))
    return model


class PartsRunner:
    """One network's torch module and its view, both opened at the same points; where codes are chosen at every one, else
    at those of modules that PyTorch calls (what a library runs as one op, it does not)."""

    name = ViewRunner.name

    def __init__(self, module: nn.Module, outputs: list[str], points: Points, view: onnx.ModelProto) -> None:
        self.module, self.outputs, self.points, self.model = module, outputs, points, view
        self.view: ViewRunner | None = None

    @torch.no_grad()
    def __call__(self, feeds: Feeds, linear: float, attention: float) -> tuple[Feeds, Feeds]:
        """(PyTorch's, the view's) outputs and computed points, inputs scaled by `linear` and `attention`."""
        fed: Feeds = {}
        computed: Feeds = {}

        def take(tensor: str, value: Tensor, factor: float) -> Tensor:
            if tensor not in fed:
                computed[tensor + COMPUTED] = value.clone()
                fed[tensor] = (value * factor).contiguous()
            return fed[tensor]

        with self._hooked(lambda name, value: take(name, value, linear), lambda n, v: take(n, v, attention)):
            wanted = dict(zip(self.outputs, self.module(*feeds.values())))
        if self.view is None:
            self.view = ViewRunner(opened(self.model, self.points.tensors if self.points.attention else list(fed)))
            self.model = onnx.ModelProto()  # a large one's memory
        return wanted | computed, self.view({**feeds, **fed})

    @contextmanager
    def _hooked(self, take: Callable[[str, Tensor], Tensor], attend: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, tensor in self.points.inputs.items():
                if (module := submodule(self.module, name)) is not None:
                    hook = module.register_forward_pre_hook(_replacing(tensor, take))
                    stack.callback(hook.remove)
            for name, tensor in self.points.outputs.items():
                if (module := submodule(self.module, name)) is not None:
                    stack.callback(module.register_forward_hook(_replacing_output(tensor, take)).remove)
            if self.points.attention:
                step: Any = self.module
                write, read = step.write, step.read
                stack.callback(lambda: vars(step).update(write=write, read=read))
                layers = iter(self.points.attention)
                now: list[tuple[str, str, str]] = []

                def writing(k: Tensor, v: Tensor, *rest: Tensor) -> Any:
                    now[:] = [next(layers)]
                    return write(attend(now[0][1], k), attend(now[0][2], v), *rest)

                def reading(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
                    return read(attend(now[0][0], q), attend(now[0][1], k), attend(now[0][2], v), *rest)

                step.write, step.read = writing, reading
            yield


def _replacing(tensor: str, take: Callable[[str, Tensor], Tensor]) -> Any:
    def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (take(tensor, given[0]), *given[1:])

    return hook


def _replacing_output(tensor: str, take: Callable[[str, Tensor], Tensor]) -> Any:
    return lambda module, given, output: take(tensor, output)


def opened_view(folder: Path, network: str, linears: Collection[str]) -> tuple[Points, onnx.ModelProto] | None:
    """Where the view of a network in `folder` is opened, and the view; None if that isn't known of it."""
    view = read_onnx(folder / f"{network}.ort.onnx")
    points = points_of(view, read_onnx(folder / f"{network}.onnx", "none"), linears)
    return None if points is None else (points, view)


def channel_error(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    """(the worst channel's relative L2 error, largest difference): one wrong row of a weight is one wrong channel.

    A channel of next to nothing counts as a tenth of the usual one.
    """
    one, other = (
        tensor.double().flatten(0, -2) if tensor.ndim > 1 else tensor.double()[None] for tensor in (wanted, got)
    )
    delta, norms = torch.linalg.vector_norm(other - one, dim=0), torch.linalg.vector_norm(one, dim=0)
    least = 0.1 * norms.square().mean().sqrt()
    allowed = torch.where(norms > least, norms, least)
    error = float((delta / torch.where(allowed > 0, allowed, torch.ones_like(allowed))).max())
    return error, float((other - one).abs().max())
