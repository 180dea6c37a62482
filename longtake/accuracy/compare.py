"""Parity PyTorch <-> ONNX: the same inputs through the recipe's torch model and the exported file's view, both in fp32.

The recipe's torch model has the recipe's fake-quant and, as the files do, stores all other parameters in bf16. Without
that, bf16's rounding (3e-3) is what one measures: under 4-bit activations it flips enough codes to reach 6e-2.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.accuracy.cases import Feeds, Run, cases, random_text, torch_runner
from longtake.accuracy.ort_session import session_from_view
from longtake.errors import GateError
from longtake.formats.recipe import Recipe
from longtake.plugins.cache_format import CACHE_FORMATS, cache_tensors
from longtake.training.models.families import family_of
from longtake.training.models.load import Models
from longtake.training.models.network_spec import NetworkSpec
from longtake.training.models.quantize import apply_precision

# Nearly equal values round to different 4-bit codes where they lie near a tie. NVFP4's own relative error on Gaussian
# data is 0.09, so two independent roundings differ by 0.13: a written 4-bit cache may differ by that, on top of what
# the pass that computed it may.
NVFP4_CACHE_GATE = 0.13


@dataclass(frozen=True)
class Row:
    """One line of the parity table. `error` is the relative L2 error of an output (the worst of a case's outputs of
    one kind), `max_abs` its largest absolute difference, `gate` what the recipe allows."""

    network: str
    case: str
    output: str
    error: float
    max_abs: float
    gate: float

    @property
    def passed(self) -> bool:
        return self.error <= self.gate

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def parity_table(
    models: Models, recipe: Recipe, folder: Path, seed: int = 0, networks: Sequence[str] | None = None
) -> Iterator[Row]:
    """Compare networks of `folder` (which holds <network>.ort.onnx) with `models`, case by case.

    `models` are the plain ones; the recipe's precision is applied here. `networks`: which (default: all).
    """
    oracle = recipe_models(models, recipe.precision)
    generator = torch.Generator().manual_seed(seed)
    family = family_of(oracle.preset)
    names = family.networks(oracle.preset)
    text = {} if "text_encoder" in names else random_text(oracle.preset, generator)
    for name in names:
        spec = family.spec(oracle.preset, recipe, name)
        torch_run = torch_runner(oracle, name, recipe)
        onnx_run = onnx_runner(folder / f"{name}.ort.onnx", spec) if networks is None or name in networks else None
        for case, feeds in cases(oracle, recipe, name, text, torch_run, generator):
            if onnx_run is None and name not in ("text_encoder", "context"):
                break
            wanted = torch_run(feeds)
            if onnx_run is not None:
                yield from _rows(spec, case, feeds, wanted, onnx_run(feeds), gate_of(recipe, name))
            if name in ("text_encoder", "context"):
                text = {b.name: value for b, value in zip(spec.outputs, wanted)}


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


def require_parity(rows: list[Row], what: str) -> None:
    """Raise GateError if a row of the table fails its gate."""
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: row.error / row.gate)
        raise GateError(
            f"{what}: {len(failed)} of {len(rows)} parity rows fail the recipe's gate",
            got=f"{worst.network}, {worst.case}, {worst.output}: relative error {worst.error:.2e}",
            expected=f"at most {worst.gate:g}",
            fix="run `longtake check` for errors layer by layer",
        )


def gate_of(recipe: Recipe, network: str) -> float:
    """The recipe's gate on the relative error of a network."""
    return float(getattr(recipe.gate, network.split("_")[0] if network.startswith("vae") else network))


def onnx_runner(path: Path, spec: NetworkSpec) -> Run:
    """Runs a view on ONNX Runtime's CPU provider, outputs in spec order."""
    session = session_from_view(path, few_passes=True)
    names = [binding.name for binding in spec.outputs]
    read = {value.name for value in session.get_inputs()}

    def run(feeds: Feeds) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in feeds.items() if name in read}
        return [torch.from_numpy(array) for array in session.run(names, arrays)]

    return run


def _rows(
    spec: NetworkSpec, case: str, feeds: Feeds, wanted: list[Tensor], got: list[Tensor], gate: float
) -> Iterator[Row]:
    """One row a kind of output, with the worst of its kind; the K/V cache is compared decoded, where it was written."""
    in_place = {name for name, _ in spec.aliases} if "write_slot" in feeds else set()
    pairs = {binding.name: pair for binding, pair in zip(spec.outputs, zip(wanted, got))}
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, pair in pairs.items():
        if name not in in_place:
            kinds.setdefault(_kind(name), []).append(difference(*pair))
    if in_place and int(feeds["write_slot"]) >= 0:
        kinds["written cache"] = list(_cache_differences(spec, pairs))
    packed = bool(in_place) and cache_format(spec) == "nvfp4"
    for kind, found in kinds.items():
        allowed = gate + NVFP4_CACHE_GATE if packed and kind == "written cache" else gate
        yield Row(spec.name, case, kind, max(e for e, _ in found), max(m for _, m in found), allowed)


def _kind(name: str) -> str:
    """Outputs that differ in a number only are of one kind: context_3 is "context", vae_cache_3_out "vae_cache"."""
    return re.sub(r"_\d+(_out)?$", "", name)


def difference(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    """(relative L2 error, largest absolute difference)."""
    delta = got.double() - wanted.double()
    norm = float(torch.linalg.vector_norm(wanted.double()))
    error = float(torch.linalg.vector_norm(delta))
    return (error / norm if norm else error), float(delta.abs().max())


def _cache_differences(spec: NetworkSpec, pairs: dict[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[float, float]]:
    """Difference of each layer's K/V after decoding."""
    names, fmt = [name for name, _ in spec.aliases], cache_format(spec)
    step = len(cache_tensors(fmt))
    for start in range(0, len(names), step):
        wanted, got = ([pairs[name][side] for name in names[start : start + step]] for side in (0, 1))
        yield difference(decoded(fmt, wanted), decoded(fmt, got))


def cache_format(spec: NetworkSpec) -> str:
    """The format of the K/V cache that a network writes in place."""
    first = spec.aliases[0][1].rpartition("_")[0] if spec.aliases else ""
    return next((fmt for fmt in CACHE_FORMATS if cache_tensors(fmt)[0].name == first), CACHE_FORMATS[0])


def decoded(fmt: str, tensors: list[Tensor]) -> Tensor:
    """One layer's cache as fp32 [S, 2, L, H, D]."""
    from longtake.plugins.nvfp4.reference import Packed, dequantize

    if fmt == "bf16":
        return tensors[0].float()
    values, scales, amax = tensors
    packed = Packed(values.view(torch.uint8), scales.view(torch.float8_e4m3fn), amax.view(*amax.shape, 1, 1, 1), "mse")
    return dequantize(packed, order="longlive")
