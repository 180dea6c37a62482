"""Quantized arithmetic in PyTorch: ModelOpt fake-quant of exactly the linears that recipes quantize.

nvfp4: weights and activations in blocks of 16 along the contraction, by rules that can be chosen (`Rules`). fp8: E4M3, a scale a tensor for activations and a
scale a row (output feature) for weights. Gradients pass straight through. A quantizer's amax is frozen by calibration,
so training calibrates again every so often: weights would outgrow it.

Calibration sees unquantized activations whatever the precision, so an activation's amax found for one serves the other:
a checkpoint trained under NVFP4 needs nothing more for fp8. One trained in bf16 has no amax: `insert_quantizers` with a
run over typical chunks, then `read_amax` for its side file, gives it one.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError, UnavailableError
from longtake.plugins.nvfp4.reference import fake_quantize
from longtake.plugins.nvfp4.weight_format import STATIC_6, UNRECORDED, WeightFormat, WeightFormats
from longtake.training.models.families import linears_of
from longtake.training.models.load import Models
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.linears import Amax

logger = logging.getLogger(__name__)

# Where our codec stands in for ModelOpt's kernel. "auto": on the CPU, for which ModelOpt has none, and on a GPU where
# its Triton kernel doesn't run (compute capability < 8.9, no Triton, no C compiler). "codec": everywhere. The two
# differ only in blocks whose scale is below 1e-5, which the Triton kernel doesn't scale by their own maximum.
QUANT_IMPL = "auto"

NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FP8: dict[str, dict[str, Any]] = {
    "input": {"num_bits": (4, 3), "axis": None},
    "weight": {"num_bits": (4, 3), "axis": 0},
}
SIDES = {"input": "input_quantizer", "weight": "weight_quantizer"}
BACKEND = "longtake_nvfp4"  # our codec, for what ModelOpt's own NVFP4 can't: rules besides static_6, tiles of 16 x 16


@dataclass(frozen=True)
class Rules:
    """How a DiT is quantized to NVFP4 in training.

    input: rule of the activations. An engine's are static_6; another rule is only for training as LongLive did.
    weight: rule, order and scale layout of the weights; exports pack them so. gradient: rule of the gradients where
    they are quantized, too (see `gradient_quant`).
    """

    input: str = "static_6"
    weight: WeightFormat = STATIC_6
    gradient: str = "static_6"

    def as_json(self) -> dict[str, Any]:
        """What a side file records."""
        return {"input": {"rule": self.input}, "weight": self.weight.as_json()}


# Named after what LongLive trains with them: its stage 1, its generator under distillation, its inference.
RULES = {
    "static_6": Rules(),
    "longlive-ar": Rules("mse", WeightFormat("static_6", block_2d=True), "mse"),
    "longlive-dmd": Rules("mse", WeightFormat("mse", block_2d=True), "mse"),
    "longlive-inference": Rules("mse", WeightFormat("mse"), "mse"),
}


@cache
def modelopt() -> Any:
    """`modelopt.torch.quantization`, with our codec as its block quantizer where QUANT_IMPL says.

    Raises:
        UnavailableError: it, or something that it imports, is not installed.
    """
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise UnavailableError(
            "nvidia-modelopt cannot be imported",
            got=str(error),
            expected="it and what it imports (requests), for calibration and 4-bit arithmetic",
            fix=f"pip install nvidia-modelopt==0.47.0 {error.name or 'requests'}",
        ) from None

    library = torch.library.Library("tensorrt", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"[\s\S]*Overriding a previously registered kernel")
        for device in codec_devices():
            library.impl("dynamic_block_quantize_op", block_quantize, device, allow_override=True)
    _LIBRARIES.append(library)
    mtq.nn.register_quant_backend(BACKEND, codec_quantize)
    return mtq


_LIBRARIES: list[torch.library.Library] = []  # an implementation lives as long as its Library object


def codec_devices() -> list[str]:
    """Dispatch keys on which our codec replaces ModelOpt's kernel."""
    if not torch.cuda.is_available():
        return ["CPU"]
    return ["CPU"] if QUANT_IMPL == "auto" and triton_kernel_runs() else ["CPU", "CUDA"]


def triton_kernel_runs() -> bool:
    """Whether ModelOpt's Triton NVFP4 kernel works on the present GPU."""
    try:
        from modelopt.torch.kernels.quantization.gemm import fp4_fake_quant_block

        x = torch.full((16, 64), 3.0, device="cuda")
        return bool((fp4_fake_quant_block(x, x.amax()) == x).all())
    except Exception as error:  # noqa: BLE001  (import, compiler and driver errors all mean the same here)
        logger.warning("ModelOpt's Triton kernel doesn't run here, so the slower codec does: %s", error)
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ModelOpt prints how many quantizers it inserted; that goes to the log."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    logger.debug("modelopt: %s", said.getvalue().strip())


def block_quantize(
    inputs: Tensor,
    block_size: int,
    amax: Tensor,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> Tensor:
    """ModelOpt's dynamic block fake-quant through our codec, for NVFP4 only."""
    if (block_size, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) != (16, 4, 2, 8, 4):
        raise LongtakeError(
            "block format is not NVFP4", got=(block_size, num_bits, scale_num_bits), expected=(16, 4, 8)
        )
    return fake_quantize(inputs, rule="static_6", order="modelopt", amax=amax.max())


class StraightThrough(torch.autograd.Function):
    """fake_quantize(x) forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, how: dict[str, Any]) -> Tensor:
        return fake_quantize(x, amax=amax, **how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


def codec_quantize(inputs: Tensor, quantizer: Any) -> Tensor:
    """ModelOpt's entry to our codec for a quantizer whose configuration names `BACKEND`."""
    return StraightThrough.apply(inputs, quantizer.amax.max(), dict(quantizer.backend_extra_args))  # type: ignore[no-any-return]


def nvfp4_config(form: WeightFormat) -> dict[str, Any]:
    """ModelOpt's configuration of a quantizer: its own NVFP4 where that is what `form` says, our codec otherwise."""
    if form.rule == "static_6" and form.order == "modelopt" and not form.block_2d:
        return NVFP4
    return {**NVFP4, "backend": BACKEND, "backend_extra_args": form.as_json()}


def quantizer_config(
    names: list[str], precision: str, rule: str = "static_6", formats: WeightFormats = UNRECORDED
) -> dict[str, Any]:
    """Everything off, then weights and inputs of the named linears (the stock configs pick other layers)."""

    def settings(name: str, side: str) -> dict[str, Any]:
        if precision == "fp8":
            return FP8[side]
        return nvfp4_config(formats.of(name) if side == "weight" else WeightFormat(rule))

    wanted = [
        {"quantizer_name": f"{name}.{quantizer}", "cfg": settings(name, side), "enable": True}
        for name in names
        for side, quantizer in SIDES.items()
    ]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *wanted], "algorithm": "max"}


def insert_quantizers(
    dit: CausalDiT, calibrate: Callable[[nn.Module], object], precision: str = "nvfp4", rules: Rules = Rules()
) -> CausalDiT:
    """Put fake-quant ("nvfp4" or "fp8") on the listed linears of `dit`, in place, with amax from `calibrate(dit)`.

    rules: of NVFP4; "fp8" has none.
    """
    names = linears_of(dit)
    config = quantizer_config(names, precision, rules.input, WeightFormats(rules.weight))
    with torch.no_grad(), quiet():
        modelopt().quantize(dit, config, forward_loop=calibrate)
    check_quantizers(dit, names)
    return dit


def recalibrate(dit: CausalDiT, calibrate: Callable[[nn.Module], object]) -> None:
    """Refresh every amax from the present weights and a run of `calibrate(dit)`, forgetting what was seen before."""
    for sides in quantizers(dit).values():
        for quantizer in sides.values():
            quantizer._calibrator.reset()  # ModelOpt keeps the largest amax it ever saw
    with torch.no_grad(), quiet():
        modelopt().calibrate(dit, algorithm="max", forward_loop=calibrate)


def quantizers(dit: nn.Module) -> dict[str, dict[str, Any]]:
    """linear name -> {"input": quantizer, "weight": quantizer}."""
    return {
        name: {side: getattr(dit.get_submodule(name), quantizer) for side, quantizer in SIDES.items()}
        for name in linears_of(dit)
    }


def check_quantizers(dit: nn.Module, names: list[str]) -> None:
    """Raise unless exactly the named linears are quantized: a pattern that matches nothing is silent in ModelOpt."""
    enabled = {
        name.rpartition(".")[0]
        for name, module in dit.named_modules()
        if name.endswith(tuple(SIDES.values())) and module.is_enabled
    }
    if enabled != set(names):
        what, got = "ModelOpt quantized other linears than asked", sorted(enabled ^ set(names))[:6]
        expected, fix = f"{len(names)} linears", "install the pinned nvidia-modelopt"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict without quantizers and LoRA adapters, under the plain model's names."""
    state = module.state_dict().items()
    return {k.replace(".base_layer.", "."): v for k, v in state if "_quantizer" not in k and ".lora_" not in k}


def read_amax(dit: nn.Module) -> Amax:
    """Calibrated amax of each quantized linear, as plain floats for the checkpoint's side file (of the largest row)."""
    return {
        name: {side: float(quantizer.amax.max()) for side, quantizer in sides.items()}
        for name, sides in quantizers(dit).items()
    }


def restore_quantizers(
    dit: CausalDiT, amax: Amax, precision: str = "nvfp4", formats: WeightFormats = UNRECORDED
) -> CausalDiT:
    """Put fake-quant with stored amax on the listed linears of `dit`, in place; no calibration data is needed.

    Activations are quantized as engines do (static_6), weights by `formats`. Under "fp8" only the activations' amax is taken from `amax`: a weight's rows are scaled by what they hold.

    Raises:
        LongtakeError: a linear has no stored amax.
    """
    missing = [name for name in linears_of(dit) if name not in amax]
    if missing:
        raise LongtakeError(
            "the checkpoint has no activation amax",
            got=f"none for {missing[0]} and {len(missing) - 1} more",
            expected="one for each quantized linear",
            fix="measure it: longtake convert --calibrate --out FOLDER (or fine-tune under NVFP4: longtake train --precision nvfp4)",
        )
    names = linears_of(dit)
    with quiet():
        modelopt().quantize(dit, {**quantizer_config(names, precision, formats=formats), "algorithm": None})
    check_quantizers(dit, names)
    for name, sides in quantizers(dit).items():
        weight = dit.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
        for side, quantizer in sides.items():
            found = amax[name][side]
            if side == "weight" and precision == "nvfp4":
                found = formats.of(name).amax_of(weight, found)
            stored = torch.tensor(found, dtype=torch.float32, device=weight.device)
            by_row = precision == "fp8" and side == "weight"
            quantizer.amax = weight.float().abs().amax(dim=1, keepdim=True) if by_row else stored
    return dit


def apply_precision(models: Models, precision: str) -> Models:
    """A copy of `models` that computes as a recipe of `precision` does.

    "bf16": weights as they are. "w4a16": the listed linears' weights replaced by what their NVFP4 form decodes to
    (weight amax = max |W|, or what they were packed with). "nvfp4" and "fp8": ModelOpt fake-quant of weights and activations with the stored
    amax, the accuracy oracle of native W4A4 and of 8-bit floats.
    """
    if precision not in ("bf16", "w4a16", "nvfp4", "fp8"):
        raise LongtakeError("unknown precision", got=precision, expected="bf16, w4a16, nvfp4 or fp8")
    dit = copy.deepcopy(models.dit)
    if precision == "w4a16":
        fold_weights(dit, models.formats)
    elif precision != "bf16":
        dit = restore_quantizers(dit, models.amax, precision, models.formats)
    return replace(models, dit=dit, precision=precision)


def fold_weights(dit: CausalDiT, formats: WeightFormats = UNRECORDED) -> None:
    """Replace each listed linear's weight by its NVFP4 round trip (static_6, ModelOpt's order, if not told otherwise)."""
    for name in linears_of(dit):
        weight = dit.get_parameter(f"{name}.weight")
        formats.of(name).round_trip_(weight, formats.of(name).amax_of(weight))
