"""Accuracy of a recipe: PyTorch fake-quant <-> ONNX Runtime <-> TensorRT, per output, per layer and per chunk.

Networks are compared through polygraphy's Comparator on the inputs of the parity table; chunks of video from the same
restored session and seed. The figure is the relative L2 error |a - b| / |a|, or the structural similarity of frames.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from polygraphy.comparator import Comparator
from torch import Tensor

from longtake.accuracy.cases import Feeds, cases, numpy_feeds, random_text, torch_runner
from longtake.accuracy.compare import NVFP4_CACHE_GATE, cache_format, decoded, difference, gate_of, recipe_models
from longtake.accuracy.layers import BLOCK, layer_tensors, with_outputs
from longtake.accuracy.ssim import ssim
from longtake.errors import GateError
from longtake.formats.onnx_file import read_onnx
from longtake.formats.recipe import Gate, Recipe
from longtake.plugins.cache_format import cache_tensors
from longtake.runtime.backends.base import Backend
from longtake.runtime.check.runners import BackendRunner, TorchRunner, ViewRunner, quiet_polygraphy
from longtake.runtime.generator import Generator, Script
from longtake.training.models.families import family_of
from longtake.training.models.load import Models
from longtake.training.models.network_spec import NetworkSpec

ORACLE, VIEW = "PyTorch", "ONNX Runtime"


@dataclass(frozen=True)
class Row:
    """One compared tensor. `layer` rows show where an error grows; only outputs and blocks can fail the gate."""

    network: str
    case: str
    output: str
    against: str
    error: float
    max_abs: float
    gate: float
    layer: bool = False

    @property
    def passed(self) -> bool:
        return self.layer or self.error <= self.gate

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class ChunkRow:
    """One chunk of video by two backends from the same state: mean and worst SSIM of its frames."""

    chunk: int
    ssim: float
    worst_frame: float
    latent_error: float
    gate: float

    @property
    def passed(self) -> bool:
        return self.ssim >= self.gate

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def check_networks(
    models: Models,
    recipe: Recipe,
    folder: Path,
    *,
    threads: int = 1,
    layers: bool = False,
    backend: Backend | None = None,
    networks: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Compare every network of `recipe`: the torch model of the same recipe with its view, and with `backend`.

    Args:
        models: unquantized; the recipe's precision is applied here.
        folder: holds <network>.ort.onnx. A network too large for a view is compared with `backend` alone.
        layers: also compare every Linear, convolution and transformer block of the view.
        backend: one more runner, such as TensorRT on a GPU.
        networks: which (default: all).
    """
    oracle = recipe_models(models, recipe.precision)
    for name, feeds in network_feeds(oracle, recipe, seed).items():
        if networks is None or name in networks:
            spec = family_of(oracle.preset).spec(oracle.preset, recipe, name)
            view = folder / f"{name}.ort.onnx"
            yield from _compare(oracle, recipe, spec, view, feeds, threads, layers, backend)


def network_feeds(oracle: Models, recipe: Recipe, seed: int) -> dict[str, dict[str, Feeds]]:
    """{network: {case: feeds}}, each network fed with what the ones before it computed."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, Feeds]] = {}
    family = family_of(oracle.preset)
    names = family.networks(oracle.preset)
    text = {} if "text_encoder" in names else random_text(oracle.preset, generator)
    for name in names:
        run = torch_runner(oracle, name, recipe)
        found[name] = dict(cases(oracle, recipe, name, text, run, generator))
        if name in ("text_encoder", "context"):
            outputs = family.spec(oracle.preset, recipe, name).outputs
            text = {b.name: value for b, value in zip(outputs, run(next(iter(found[name].values()))))}
    return found


def _compare(
    oracle: Models,
    recipe: Recipe,
    spec: NetworkSpec,
    path: Path,
    feeds: dict[str, Feeds],
    threads: int,
    layers: bool,
    backend: Backend | None,
) -> Iterator[Row]:
    """Rows of one network: its cases through all runners, each compared with the torch model."""
    view: Path | onnx.ModelProto = read_onnx(path) if layers else path
    marked = layer_tensors(view) if isinstance(view, onnx.ModelProto) else {}
    if isinstance(view, onnx.ModelProto):
        view = with_outputs(view, list(marked.values()))
    labels = {tensor: layer for layer, tensor in marked.items()}
    module = family_of(oracle.preset).module(oracle, recipe, spec.name)
    runners = [
        TorchRunner(ORACLE, spec, module, marked),
        *([ViewRunner(VIEW, view, threads)] if backend is None or path.is_file() else []),
        *([BackendRunner(backend, spec)] if backend else []),
    ]
    with quiet_polygraphy():
        results = Comparator.run(runners, data_loader=[numpy_feeds(feed) for feed in feeds.values()])
    (_, wanted), *others = results
    gate = gate_of(recipe, spec.name)
    for against, iterations in others:
        for case, one, other in zip(feeds, wanted, iterations):
            for output, (error, largest) in differences(spec, labels, one, other).items():
                allowed = gate + NVFP4_CACHE_GATE if _is_packed_cache(output, recipe.cache) else gate
                yield Row(spec.name, case, output, against, error, largest, allowed, _is_inner(output, marked))


def _is_packed_cache(output: str, cache: str) -> bool:
    return cache == "nvfp4" and output.startswith("cache_")


def _is_inner(output: str, layers: Mapping[str, str]) -> bool:
    """Whether an output is a single Linear or convolution: only network outputs and whole blocks are gated."""
    return output in layers and not BLOCK.fullmatch(output)


Found = OrderedDict[str, tuple[float, float]]


def differences(spec: NetworkSpec, labels: dict[str, str], wanted: Any, got: Any) -> Found:
    """{output or layer: (relative L2 error, largest difference)} of two runners' results for the same feed.

    K/V caches are compared decoded, one figure a layer, over the slots in which they differ at all: slots that a pass
    did not write are equal and would dilute the figure.
    """
    found: Found = OrderedDict()
    aliased = [name for name, _ in spec.aliases] if spec.name == "dit" else []  # a VAE's caches are plain numbers
    for name in wanted:
        if name in got and name not in aliased and wanted[name].size == got[name].size:
            pair = (torch.as_tensor(np.array(side[name])).flatten() for side in (wanted, got))
            found[labels.get(name, name)] = difference(*pair)
    fmt = cache_format(spec)
    step = len(cache_tensors(fmt))
    for layer in range(len(aliased) // step):
        names = aliased[layer * step : (layer + 1) * step]
        caches = (decoded(fmt, [torch.as_tensor(np.array(side[name])) for name in names]) for side in (wanted, got))
        found[f"cache_{layer}"] = _changed_slots_difference(*caches)
    return found


def _changed_slots_difference(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    changed = [slot for slot in range(wanted.shape[0]) if not torch.equal(wanted[slot], got[slot])]
    return difference(wanted[changed], got[changed]) if changed else (0.0, 0.0)


def check_chunks(
    candidate: Generator,
    reference: Generator,
    script: Script,
    gate: Gate,
    chunks: int | None,
    seed: int = 0,
    **options: Any,
) -> Iterator[ChunkRow]:
    """Generate `chunks` chunks (None: the whole script) with `reference`; from each one's start, also with `candidate`.

    `options` go to `Generator.session` (steps, guidance).
    """
    with (
        reference.session(script, seed, chunks=chunks, **options) as theirs,
        candidate.session(script, seed, chunks=chunks, **options) as ours,
    ):
        while theirs.remaining:
            ours.restore(theirs.snapshot())
            wanted, got = next(theirs), next(ours)
            similarity = ssim(wanted.frames, got.frames)
            error, _ = difference(wanted.latents.cpu(), got.latents.cpu())
            yield ChunkRow(wanted.index, float(similarity.mean()), float(similarity.min()), error, gate.ssim)


def require_gates(rows: Sequence[Row], chunks: Sequence[ChunkRow], recipe: Recipe) -> None:
    """Raise GateError naming the worst row if any fails."""
    failed = [row for row in rows if not row.passed]
    blurred = [row for row in chunks if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: row.error / row.gate if row.error == row.error else float("inf"))
        raise GateError(
            f"recipe {recipe.name}: {len(failed)} of {len(rows)} comparisons fail the accuracy gate",
            got=f"{worst.network}, {worst.case}, {worst.output} against {worst.against}: error {worst.error:.2e}",
            expected=f"at most {worst.gate:g}",
            fix="look for the layer where it begins: longtake check --layers",
        )
    if blurred:
        low = min(blurred, key=lambda row: row.ssim)
        raise GateError(
            f"recipe {recipe.name}: {len(blurred)} of {len(chunks)} chunks fail the accuracy gate",
            got=f"chunk {low.chunk}: SSIM {low.ssim:.4f}",
            expected=f"at least {low.gate:g}",
            fix="compare the networks layer by layer: longtake check --layers",
        )
