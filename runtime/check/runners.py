"""polygraphy runners for the three ways a network runs: the torch model, its ONNX view, and a runtime backend."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER
from torch import Tensor, nn

from longtake.accuracy.ort_session import session_from_model, session_from_view
from longtake.dtypes import DTYPES
from longtake.runtime.backends.base import Backend, State
from longtake.training.models.network_spec import NetworkSpec

Arrays = OrderedDict[str, np.ndarray]


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """polygraphy's log goes to stdout; only what stops it is wanted there."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


class _SpecRunner(BaseRunner):
    """A runner whose inputs are those of a NetworkSpec; subclasses compute in `infer_arrays`."""

    def __init__(self, name: str, spec: NetworkSpec) -> None:
        super().__init__(name=name)
        self.spec = spec

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for b in self.spec.inputs:
            shape = tuple(-1 if isinstance(size, str) else size for size in b.shape)
            metadata.add(b.name, DTYPES[b.dtype].host.numpy, shape)
        return metadata

    @torch.no_grad()
    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> Arrays:
        start = time.perf_counter()
        outputs = self.infer_arrays(feed_dict)
        self.inference_time = time.perf_counter() - start
        return outputs

    def infer_arrays(self, feed_dict: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by binding name."""
        raise NotImplementedError


class TorchRunner(_SpecRunner):
    """The torch module of a network in fp32; `layers` maps a module's name to the output name it gets."""

    def __init__(self, name: str, spec: NetworkSpec, module: nn.Module, layers: Mapping[str, str]) -> None:
        super().__init__(name, spec)
        self.module = module
        self.layers = {output: found for key, output in layers.items() if (found := _submodule(module, key))}

    def infer_arrays(self, feed_dict: Mapping[str, np.ndarray]) -> Arrays:
        seen: dict[str, list[Tensor]] = {}
        hooks = [found.register_forward_hook(_keep(seen, name)) for name, found in self.layers.items()]
        try:
            outputs = self.module(*(torch.as_tensor(feed_dict[b.name]) for b in self.spec.inputs))
        finally:
            for hook in hooks:
                hook.remove()
        named = OrderedDict((b.name, t.numpy()) for b, t in zip(self.spec.outputs, outputs))
        named.update((name, values[0].numpy()) for name, values in seen.items() if len(values) == 1)
        return named


def _submodule(step: nn.Module, name: str) -> nn.Module | None:
    """`name` is relative to the model inside a step module (its only child)."""
    for child in step.children():
        try:
            return child.get_submodule(name)
        except AttributeError:
            continue
    return None


def _keep(seen: dict[str, list[Tensor]], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.setdefault(name, []).append(output.detach())

    return hook


class ViewRunner(OnnxrtRunner):
    """ONNX Runtime on the CPU over a view (a file, or a model in memory), limited to `threads`."""

    def __init__(self, name: str, view: Path | onnx.ModelProto, threads: int) -> None:
        super().__init__(lambda: _session(view, threads), name=name)


def _session(view: Path | onnx.ModelProto, threads: int) -> Any:
    if isinstance(view, Path):
        return session_from_view(view, threads, few_passes=True)
    return session_from_model(view, threads)


class BackendRunner(_SpecRunner):
    """A runtime backend, one network of it, with its state set from the feeds."""

    def __init__(self, backend: Backend, spec: NetworkSpec) -> None:
        super().__init__(backend.name, spec)
        self.backend = backend

    def infer_arrays(self, feed_dict: Mapping[str, np.ndarray]) -> Arrays:
        feeds = {name: torch.as_tensor(value) for name, value in feed_dict.items()}
        state = self._state(feeds)
        # The slot stays on the host, see Backend.run.
        inputs = {n: t if n == self.spec.slot else t.to(self.backend.device) for n, t in feeds.items()}
        commit = not self.spec.slot or int(feeds[self.spec.slot]) >= 0
        outputs = dict(self.backend.run(self.spec.name, inputs, state, commit))
        outputs |= {out: state.tensors[name] for out, name in self.spec.kept.items()} if state else {}
        arrays = ((b, outputs[b.name].detach().cpu()) for b in self.spec.outputs)
        return OrderedDict(
            (b.name, (t if t.dtype == torch.int8 else t.float()).numpy().copy().reshape(_sizes(b.shape)))
            for b, t in arrays
        )

    def _state(self, feeds: dict[str, Tensor]) -> State | None:
        """A state that holds what the feeds say of it; that is taken out of them. None if the network keeps nothing."""
        if not self.spec.kept:
            return None
        state = self.backend.new_state(self.spec.name.replace("_first", "_steady"))
        for name, tensor in state.tensors.items():
            if name in feeds:
                tensor.copy_(feeds.pop(name))
        return state


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(size, str) else size for size in shape)
