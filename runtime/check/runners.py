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
from longtake.runtime.backends.base import Backend, Cache
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
    """A runtime backend, one network of it, with the state it keeps set from the feeds."""

    def __init__(self, backend: Backend, spec: NetworkSpec) -> None:
        super().__init__(backend.name, spec)
        self.backend = backend
        self.cache: Cache = backend.new_cache() if spec.name == "dit" else []

    def infer_arrays(self, feed_dict: Mapping[str, np.ndarray]) -> Arrays:
        feeds = {name: torch.as_tensor(value).to(self.backend.device) for name, value in feed_dict.items()}
        outputs = getattr(self, f"_{self.spec.name}")(feeds)
        arrays = (t.detach().cpu() for t in outputs)
        return OrderedDict(
            (b.name, (t if t.dtype == torch.int8 else t.float()).numpy().copy().reshape(_sizes(b.shape)))
            for b, t in zip(self.spec.outputs, arrays)
        )

    def _text_encoder(self, feeds: dict[str, Tensor]) -> list[Tensor]:
        return [self.backend.text(feeds["tokens"])]

    def _context(self, feeds: dict[str, Tensor]) -> list[Tensor]:
        return list(self.backend.context(feeds["embeddings"]))

    def _dit(self, feeds: dict[str, Tensor]) -> list[Tensor]:
        layers = len(self.cache)
        held = [t for layer in self.cache for t in layer]
        given = list(feeds.values())[-len(held) :]
        for tensor, value in zip(held, given):
            tensor.copy_(value)
        context = [t.to(self._context_dtype()) for t in list(feeds.values())[6 : 6 + layers]]
        latents, sinusoid, cos, sin, table, write_slot = list(feeds.values())[:6]
        velocity = self.backend.dit(latents, sinusoid, cos, sin, context, self.cache, table, write_slot)
        return [velocity, *held]

    def _context_dtype(self) -> torch.dtype:
        return torch.float32 if self.backend.device.type == "cpu" else torch.bfloat16

    def _vae_first(self, feeds: dict[str, Tensor]) -> list[Tensor]:
        return self._decode(feeds["latent"], [])

    def _vae_steady(self, feeds: dict[str, Tensor]) -> list[Tensor]:
        return self._decode(feeds["latent"], list(feeds.values())[1:])

    def _vae_encoder_first(self, feeds: dict[str, Tensor]) -> list[Tensor]:
        """The latent; an encoder's caches cannot be read."""
        return [self.backend.new_encoder().encode(feeds["frames"][0])[:, :, None]]

    def _decode(self, latent: Tensor, caches: list[Tensor]) -> list[Tensor]:
        decoder = self.backend.new_decoder()
        decoder.load_state(caches)
        frames = decoder.decode(latent[:, :, 0])
        return [frames[None], *decoder.state()]


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(size, str) else size for size in shape)
