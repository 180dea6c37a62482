"""The steps of the library's VAE decoder, recorded from the module itself: for a budget before anything is exported.

The same as cutting the exported graph gives, but for what the engine segments compute and the names of tensors between.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.dtypes import DTYPES, of_torch
from longtake.formats.segmented_graph import Segment, SegmentedGraph, Step, TensorType
from longtake.plugins.spec import DOMAIN
from longtake.training.models.presets import Preset
from longtake.training.models.wan.spec import vae_spec

NETWORK = "vae_steady"


@lru_cache
def library_decoder_steps(preset: Preset, vae_conv: str = "bf16") -> SegmentedGraph:
    """`vae_steady` with `vae_ops: library`, run without data; `vae_conv`: as in a recipe (the two kinds of codes take the same)."""
    from longtake.training.models.wan.vae import CausalVAE
    from longtake.training.models.wan.vae_codes import CodedConv, chosen_codes, codable
    from longtake.training.models.wan.vae_library import LibrarySteady

    spec = vae_spec(preset, NETWORK, "library", vae_conv)
    with torch.device("meta"):
        vae = CausalVAE(preset.vae)
        chosen, layers = chosen_codes(preset.vae, vae_conv, None), codable(vae)
        coded = {name: CodedConv(layers[name].weight, codes, 1.0) for name, codes in chosen.items()}
        module = LibrarySteady(vae, coded=coded).eval().to(torch.bfloat16)
        given = {b.name: torch.empty([int(n) for n in b.shape], dtype=DTYPES[b.dtype].torch) for b in spec.inputs}
    weights: dict[str, Tensor] = {n.removeprefix("vae."): parameter for n, parameter in module.named_parameters()}
    weights |= {name: tensor for name, tensor in module.named_buffers() if name.startswith("coded.")}
    recorder = Recorder(given | weights)
    with torch.no_grad(), recorder:
        outputs = module(*given.values())
    names = [b.name for b in spec.outputs]
    return recorder.graph(list(given), dict(zip(names, outputs, strict=True)), list(weights))


class Recorder(TorchDispatchMode):
    """Notes each op of ours as a step; whatever else makes one of its inputs becomes a segment before it."""

    def __init__(self, known: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in known.items()}
        self._alive: list[Tensor] = list(known.values())  # an id must not be given anew
        self._given, self._read = set(known), dict[str, None]()
        self.steps: list[Step] = []
        self.tensors = {name: _type_of(tensor) for name, tensor in known.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [tensor for tensor in args if isinstance(tensor, Tensor)]
        made = [
            tensor
            for tensor in (result if isinstance(result, tuple | list) else (result,))
            if isinstance(tensor, Tensor)
        ]
        self._alive += made
        if func.namespace == DOMAIN:
            self._op(func._schema.name.split("::")[1], inputs, made)
        else:  # in a segment, with what it reads of the ops' outputs
            self._read |= {self._names[id(t)]: None for t in inputs if id(t) in self._names}
            inner = {id(t) for t in inputs if id(t) not in self._names}
            self._alive += [t for t in inputs if id(t) in inner]
        return result

    def _op(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        fresh = {id(tensor): tensor for tensor in inputs if id(tensor) not in self._names}
        if fresh:
            self._segment([self._named(tensor) for tensor in fresh.values()])
        step = Step("op", name, tuple(map(self._named, inputs)), tuple(map(self._named, outputs)))
        self.steps.append(step)

    def _segment(self, outputs: Iterable[str]) -> None:
        number = sum(step.kind == "segment" for step in self.steps)
        self.steps.append(Step("segment", f"{NETWORK}_seg{number}", tuple(self._read), tuple(outputs)))
        self._read = {}

    def _named(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            self._names[id(tensor)] = f"tensor_{len(self._names)}"
            self.tensors[self._names[id(tensor)]] = _type_of(tensor)
        return self._names[id(tensor)]

    def graph(self, inputs: list[str], outputs: dict[str, Tensor], weights: list[str]) -> SegmentedGraph:
        """The network, whose outputs get the names in `outputs`; the last segment makes those that no op made."""
        missing = [name for name, tensor in outputs.items() if id(tensor) not in self._names]
        new = {self._named(tensor): name for name, tensor in outputs.items()}
        if missing:
            self._segment([self._named(outputs[name]) for name in missing])
        steps = tuple(Step(s.kind, s.name, _renamed(s.inputs, new), _renamed(s.outputs, new)) for s in self.steps)
        tensors = {new.get(name, name): kind for name, kind in self.tensors.items()}
        segments = tuple(_segment_of(step, tensors) for step in steps if step.kind == "segment")
        used = {name for step in steps for name in step.inputs}
        kept = tuple(name for name in weights if name in used)
        return SegmentedGraph(NETWORK, tuple(inputs), tuple(outputs), kept, tensors, segments, steps)


def _segment_of(step: Step, tensors: dict[str, TensorType]) -> Segment:
    """A step's plan, its bindings called by position."""
    inputs, outputs = (
        tuple(f"{letter}{i}" for i in range(len(names))) for letter, names in (("x", step.inputs), ("y", step.outputs))
    )
    types = dict(zip((*inputs, *outputs), (tensors[name] for name in (*step.inputs, *step.outputs)), strict=True))
    return Segment(step.name, inputs, outputs, types)


def _type_of(tensor: Tensor) -> TensorType:
    return TensorType(of_torch(tensor.dtype).name, tuple(tensor.shape))


def _renamed(names: tuple[str, ...], new: dict[str, str]) -> tuple[str, ...]:
    return tuple(new.get(name, name) for name in names)
