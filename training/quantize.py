"""NVFP4 in the training loop: ModelOpt fake-quant of exactly the linears that recipes quantize.

Weights and activations are rounded to NVFP4 in blocks of 16 along the contraction; gradients pass straight through.
A quantizer's amax is frozen by calibration, so training calibrates again every so often: weights would outgrow it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longtake.runtime.errors import LongtakeError
from longtake.training.dit import CausalDiT
from longtake.training.networks import Amax, quantized_linears

logger = logging.getLogger(__name__)

# Where our codec stands in for ModelOpt's kernel. "auto": on the CPU, for which ModelOpt has none, and on a GPU where
# its Triton kernel doesn't run (compute capability < 8.9, no Triton, no C compiler). "codec": everywhere. The two
# differ only in blocks whose scale is below 1e-5, which the Triton kernel doesn't scale by their own maximum.
QUANT_IMPL = "auto"

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
SIDES = {"input": "input_quantizer", "weight": "weight_quantizer"}


@cache
def modelopt() -> Any:
    """`modelopt.torch.quantization`, with our codec as its block quantizer where QUANT_IMPL says."""
    import modelopt.torch.quantization as mtq

    library = torch.library.Library("tensorrt", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"[\s\S]*Overriding a previously registered kernel")
        for device in codec_devices():
            library.impl("dynamic_block_quantize_op", block_quantize, device, allow_override=True)
    _LIBRARIES.append(library)
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
    from longtake.plugins.nvfp4.reference import fake_quantize

    if (block_size, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) != (16, 4, 2, 8, 4):
        raise LongtakeError(
            "block format is not NVFP4", got=(block_size, num_bits, scale_num_bits), expected=(16, 4, 8)
        )
    return fake_quantize(inputs, rule="static_6", order="modelopt", amax=amax.max())


def quantizer_config(names: list[str]) -> dict[str, Any]:
    """Everything off, then NVFP4 weights and inputs for the named linears (the stock config picks other layers)."""
    wanted = [
        {"quantizer_name": f"{name}.{quantizer}", "cfg": NVFP4, "enable": True}
        for name in names
        for quantizer in SIDES.values()
    ]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *wanted], "algorithm": "max"}


def insert_quantizers(dit: CausalDiT, calibrate: Callable[[nn.Module], object]) -> CausalDiT:
    """Put NVFP4 fake-quant on the listed linears of `dit`, in place, with amax from a run of `calibrate(dit)`."""
    names = quantized_linears(dit)
    with torch.no_grad(), quiet():
        modelopt().quantize(dit, quantizer_config(names), forward_loop=calibrate)
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
        for name in quantized_linears(dit)
    }


def check_quantizers(dit: nn.Module, names: list[str]) -> None:
    """Raise unless exactly the named linears are quantized: a pattern that matches nothing is silent in ModelOpt."""
    enabled = {
        name.rpartition(".")[0]
        for name, module in dit.named_modules()
        if name.endswith(tuple(SIDES.values())) and module.is_enabled
    }
    if enabled != set(names):
        raise LongtakeError(
            "ModelOpt quantized other linears than asked",
            got=sorted(enabled ^ set(names))[:6],
            expected=f"{len(names)} linears",
            fix="install the pinned nvidia-modelopt",
        )


def read_amax(dit: nn.Module) -> Amax:
    """Calibrated amax of each quantized linear, as plain floats for the checkpoint's side file."""
    return {
        name: {side: float(quantizer.amax) for side, quantizer in sides.items()}
        for name, sides in quantizers(dit).items()
    }


def restore_quantizers(dit: CausalDiT, amax: Amax) -> CausalDiT:
    """Put fake-quant with stored amax on the listed linears of `dit`, in place; no calibration data is needed.

    Raises:
        LongtakeError: a linear has no stored amax.
    """
    missing = [name for name in quantized_linears(dit) if name not in amax]
    if missing:
        raise LongtakeError(
            "the checkpoint has no activation amax",
            got=f"none for {missing[0]} and {len(missing) - 1} more",
            expected="one for each quantized linear",
            fix="fine-tune it under NVFP4: longtake train --stage dit --precision nvfp4 --init FOLDER",
        )
    names = quantized_linears(dit)
    with quiet():
        modelopt().quantize(dit, {**quantizer_config(names), "algorithm": None})
    check_quantizers(dit, names)
    device = next(dit.parameters()).device
    for name, sides in quantizers(dit).items():
        for side, quantizer in sides.items():
            quantizer.amax = torch.tensor(amax[name][side], dtype=torch.float32, device=device)
    return dit
