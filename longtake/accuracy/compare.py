"""Every network of a recipe, run by the recipe's torch model and by others on the same inputs, and how far they differ.

The recipe's torch model has the recipe's fake-quant and, as the files do, stores all other parameters in bf16. Without
that, bf16's rounding (3e-3) is what one measures: under 4-bit activations it flips enough codes to reach 6e-2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from longtake.accuracy.cases import cases, random_text
from longtake.accuracy.layers import BLOCK, layer_tensors, with_outputs
from longtake.accuracy.parts import COMPUTED, SCALES, PartsRunner, channel_error, opened_view, plain_points
from longtake.accuracy.rows import Row
from longtake.accuracy.runners import Feeds, Runner, TorchRunner, ViewRunner
from longtake.accuracy.stored import stored_rows
from longtake.formats.onnx_file import read_onnx
from longtake.formats.recipe import LINEARS, Recipe
from longtake.plugins.cache_format import CACHE_FORMATS, cache_tensors
from longtake.training.models.families import family_of
from longtake.training.models.load import Models
from longtake.training.models.network_spec import NetworkSpec
from longtake.training.models.quantize import apply_precision

# Nearly equal values round to different 4-bit codes where they lie near a tie. NVFP4's own relative error on Gaussian
# data is 0.09, so two independent roundings differ by 0.13: a written 4-bit cache may differ by that, on top of what
# the pass that computed it may.
NVFP4_CACHE_GATE = 0.13
# PyTorch and ONNX Runtime both compute in fp32 on the same numbers: 2e-5 apart where all is right, at most.
EXACT_GATE = 3e-4
PLAIN_GATE = 1e-4  # without codes, quantizers and an attention that is fed: 1e-6 at most
OPENED = (
    "a prompt",
    "first chunk",
    "full window, writes",
    "start of a clip",
    "second step",
)  # the cases that a network is also taken apart in
WIRING = "blocks that end in a sum, attentions that read the k and v written beside them"
TEXT = ("text_encoder", "context")  # networks whose outputs the ones after them are fed with
Differences = dict[str, tuple[float, float]]


def compare_networks(
    models: Models,
    recipe: Recipe,
    folder: Path,
    *,
    layers: bool = False,
    backend: Callable[[NetworkSpec], Runner] | None = None,
    networks: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Compare every network of `recipe`, case by case: the torch model of the same recipe with its view and `backend`.

    Args:
        models: unquantized; the recipe's precision is applied here.
        folder: holds <network>.ort.onnx. A network too large for a view is compared with `backend` alone.
        layers: also compare every Linear, convolution and transformer block of the view.
        backend: makes one more runner of a network, such as TensorRT on a GPU.
        networks: which (default: all).
    """
    oracle = recipe_models(models, recipe.precision)
    generator = torch.Generator().manual_seed(seed)
    family = family_of(oracle.preset)
    names = family.networks(oracle.preset)
    text = {} if "text_encoder" in names else random_text(oracle.preset, generator)
    for name in names:
        spec, view = family.spec(oracle.preset, recipe, name), folder / f"{name}.ort.onnx"
        chosen = networks is None or name in networks
        if not chosen and name not in TEXT:
            continue
        marked: dict[str, str] = {}
        others: list[Runner] = []
        if chosen and layers:
            model = read_onnx(view)
            marked = layer_tensors(model)
            others = [ViewRunner(with_outputs(model, list(marked.values())))]
        elif chosen and (backend is None or view.is_file()):
            others = [ViewRunner(view)]
        others += [backend(spec)] if chosen and backend else []
        run = TorchRunner(oracle, name, recipe, marked)
        parts = _parts(folder, oracle, run, spec, recipe) if chosen and view.is_file() else None
        quantized = _quantized(spec, name)
        if chosen and parts is None and view.is_file() and recipe.linears == LINEARS[0] and "camera" not in family.can:
            yield Row(name, "as wired", WIRING, "PyTorch", 1.0, 1.0, EXACT_GATE, part=True)
        exact = parts is not None or not quantized
        yield from stored_rows(run.module, name, folder / f"{name}.onnx") if chosen else ()
        for case, feeds in cases(oracle, recipe, name, text, run, generator):
            wanted = run(feeds)
            text = {b.name: wanted[b.name] for b in spec.outputs} if name in TEXT else text
            for other in others:
                rows = _rows(spec, recipe, case, other.name, differences(spec, marked, wanted, other(feeds)))
                viewed = isinstance(other, ViewRunner) and exact
                yield from (_viewed(row, informs=quantized) for row in rows) if viewed else rows
            if parts and case in OPENED:
                yield from _part_rows(parts, spec, case, feeds, quantized)


def _quantized(spec: NetworkSpec, name: str) -> bool:
    """Whether codes are chosen in a network: then its error as a whole says little (see `parts`)."""
    return bool(spec.slot) or name == "context"


def _parts(folder: Path, oracle: Models, run: TorchRunner, spec: NetworkSpec, recipe: Recipe) -> PartsRunner | None:
    """What compares a network part by part; None if codes are chosen in it and its graph isn't known so well."""
    if not _quantized(spec, spec.name):
        return PartsRunner(run.module, run.outputs, *plain_points(read_onnx(folder / f"{spec.name}.ort.onnx")))
    found = opened_view(folder, spec.name, family_of(oracle.preset).linears(oracle.dit))
    return None if found is None else PartsRunner(run.module, run.outputs, *found)


def _viewed(row: Row, informs: bool) -> Row:
    """A row of the view, of which more is known than the recipe's gate: fp32 on both sides."""
    return replace(row, informs=True) if informs else replace(row, gate=min(row.gate, PLAIN_GATE))


def _part_rows(parts: PartsRunner, spec: NetworkSpec, case: str, feeds: Feeds, quantized: bool) -> Iterator[Row]:
    """Every part of one case, in each of the scales; each must agree but for fp32's rounding."""
    gate = EXACT_GATE if quantized else PLAIN_GATE
    for scale in list(SCALES)[0 if quantized else 1 :]:
        wanted, got = parts(feeds, *SCALES[scale])
        whole = {name: value for name, value in wanted.items() if not name.endswith(COMPUTED)}
        errors = differences(spec, {}, whole, got)
        for tensor in parts.points.tensors:
            if (name := tensor + COMPUTED) not in got:
                continue
            errors[parts.points.label(tensor)] = channel_error(wanted[name], got[name])
        for output, (error, largest) in errors.items():
            row = Row(spec.name, case + scale, output, parts.name, error, largest, gate, part=True)
            yield row


def _rows(spec: NetworkSpec, recipe: Recipe, case: str, against: str, differences: Differences) -> Iterator[Row]:
    named = {"camera": "context"}.get(spec.name, spec.name)  # a chunk's cameras are read as a prompt is
    gate = float(getattr(recipe.gate, "vae" if spec.name.startswith("vae") else named))
    outputs = {binding.name for binding in spec.outputs}
    for output, (error, largest) in differences.items():
        cache = bool(spec.slot) and output.startswith("cache_")
        inner = not (cache or output in outputs or BLOCK.fullmatch(output))
        allowed = gate + NVFP4_CACHE_GATE if cache and recipe.cache == "nvfp4" else gate
        yield Row(spec.name, case, output, against, error, largest, allowed, inner)


def differences(spec: NetworkSpec, layers: dict[str, str], wanted: Feeds, got: Feeds) -> Differences:
    """{output or layer: (relative L2 error, largest difference)} of two runners' results for the same feed.

    K/V caches are compared decoded, one figure a layer, over the slots in which they differ at all: slots that a pass
    did not write are equal and would dilute the figure.
    """
    labels = {tensor: layer for layer, tensor in layers.items()}
    caches = [name for name, _ in spec.aliases] if spec.slot else []  # a VAE's caches are plain numbers
    plain = [
        name for name in wanted if name in got and name not in caches and wanted[name].numel() == got[name].numel()
    ]
    errors = {labels.get(name, name): difference(wanted[name].flatten(), got[name].flatten()) for name in plain}
    fmt = cache_format(spec)
    step = len(cache_tensors(fmt))
    for layer in range(len(caches) // step):
        names = caches[layer * step : (layer + 1) * step]
        one, other = (decoded(fmt, [side[name] for name in names]) for side in (wanted, got))
        changed = [slot for slot in range(one.shape[0]) if not torch.equal(one[slot], other[slot])]
        errors[f"cache_{layer}"] = difference(one[changed], other[changed]) if changed else (0.0, 0.0)
    return errors


def difference(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    """(relative L2 error, largest absolute difference)."""
    delta = got.double() - wanted.double()
    norm = float(torch.linalg.vector_norm(wanted.double()))
    error = float(torch.linalg.vector_norm(delta))
    return (error / norm if norm else error), float(delta.abs().max())


def cache_format(spec: NetworkSpec) -> str:
    """The format of the K/V cache that a network writes in place; of other state "bf16": plain numbers."""
    first = spec.aliases[0][1].rpartition("_")[0] if spec.aliases else ""
    return next((fmt for fmt in CACHE_FORMATS if cache_tensors(fmt)[0].name == first), "bf16")


def decoded(fmt: str, tensors: list[Tensor]) -> Tensor:
    """One layer's cache as fp32 [S, 2, L, H, D]."""
    from longtake.plugins.sink_attention.reference import dequantize_kv

    return tensors[0].float() if fmt == "bf16" else dequantize_kv(*tensors)


@torch.no_grad()
def recipe_models(models: Models, precision: str) -> Models:
    """A copy of `models` as a recipe stores them, in fp32 tensors: the accuracy oracle of its files.

    The quantized linears' weights go through NVFP4 from fp32; every other parameter is rounded to bf16.
    """
    stored = apply_precision(models, precision)  # its DiT is a copy already
    stored = replace(stored, vae=copy.deepcopy(stored.vae), text=copy.deepcopy(stored.text))
    if precision == "nvfp4":
        _quantize_weights_once(stored)
    packed = (
        set() if precision == "bf16" else {f"{name}.weight" for name in family_of(models.preset).linears(stored.dit)}
    )
    for module in (stored.dit, stored.vae, stored.text):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not (module is stored.dit and (name in packed or name.endswith("_amax"))):
                tensor.copy_(tensor.to(torch.bfloat16))
    return stored


def _quantize_weights_once(models: Models) -> None:
    """Store each quantized weight as its quantizer yields it, bit for bit, and turn that off: it would do so anew in
    every pass, which takes most of the time at real widths."""
    from longtake.training.models.quantize import quantizers

    for name, sides in quantizers(models.dit).items():
        weight, form = models.dit.get_parameter(f"{name}.weight"), models.formats.of(name)
        form.round_trip_(weight, form.amax_of(weight, models.amax[name]["weight"]))
        sides["weight"].disable()
