"""Which of the VAE decoder's convolutions run in 8-bit codes, in which codes, and with what scales.

All but the first, the last and the 1x1x1 ones may. A convolution's input is coded with one scale that calibration found, its
weight with one a channel that comes out.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.plugins.codes import factor_of
from longtake.plugins.conv8.reference import stored_weight
from longtake.training.models.conv_calibration import FIX, ConvCalibration, ConvInput
from longtake.training.models.presets import VAEConfig
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.vae_layers import CausalConv3d

log = logging.getLogger(__name__)


def codable(vae: CausalVAE) -> dict[str, nn.Conv3d]:
    """The decoder's convolutions that may run in codes, by name, in the order in which they run."""
    found = {}
    for name, layer in vae.decoder.named_modules(prefix="decoder"):
        ends = name.startswith(("decoder.conv_in", "decoder.conv_out"))
        if isinstance(layer, nn.Conv3d) and not ends and layer.kernel_size != (1, 1, 1):
            if layer.in_channels % 16 or layer.out_channels % 8:
                log.warning(
                    "%s stays in bf16: the kernel takes a multiple of 16 channels to a multiple of 8, not %d to %d",
                    name,
                    layer.in_channels,
                    layer.out_channels,
                )
                continue
            found[name] = layer
    return found


@lru_cache
def codable_names(config: VAEConfig) -> tuple[str, ...]:
    """Their names, from the configuration alone."""
    with torch.device("meta"):
        return tuple(codable(CausalVAE(config)))


@lru_cache
def coded_caches(config: VAEConfig) -> tuple[str, ...]:
    """Of each of the decoder's caches, in binding order: the convolution whose codes it holds, or "" if it holds bf16."""
    with torch.device("meta"):
        decoder = CausalVAE(config).decoder
    past = (name for name, m in decoder.named_modules(prefix="decoder") if isinstance(m, CausalConv3d) and m.past)
    names = codable_names(config)
    return tuple(f"{name}.conv" if f"{name}.conv" in names else "" for name in past)


def chosen_codes(config: VAEConfig, how: str, calibration: ConvCalibration | None) -> dict[str, str]:
    """Codes by the convolution's name, as a recipe's `vae_conv` says. Without a calibration (a graph without weights) those
    of "calibrated" are E4M3."""
    if how == "bf16":
        return {}
    names = codable_names(config)
    if how != "calibrated":
        return dict.fromkeys(names, how)
    return {name: calibration.inputs[name].codes if calibration else "fp8" for name in names}


def counted(chosen: Mapping[str, str], total: int) -> dict[str, int]:
    """How many of the decoder's `total` convolutions run in which codes, for a report."""
    counts = Counter(chosen.values())
    return {**{codes: counts[codes] for codes in ("fp8", "int8")}, "bf16": total - len(chosen)}


class CodedConv(nn.Module):
    """A convolution's codes [N,C,t,y,x] int8, scale [N] (of a product of codes) and factor [1] (of its input), both fp32.

    One behind an upsampling is folded before it is coded: [4N,C,1,2,2] and [4N]; see plugins/conv8/reference.py.
    """

    weight: Tensor
    scale: Tensor
    factor: Tensor

    def __init__(self, weight: Tensor, codes: str, peak: float) -> None:
        super().__init__()
        self.codes = codes
        factor = factor_of(peak, codes)
        stored, worth = stored_weight(weight, codes)
        self.register_buffer("weight", stored)
        self.register_buffer("scale", worth / factor)
        self.register_buffer("factor", torch.full((1,), factor, device=weight.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with its module, and keeps its dtypes."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def coded_convs(vae: CausalVAE, how: str, calibration: ConvCalibration | None) -> dict[str, CodedConv]:
    """The convolutions of `vae` that a recipe's `vae_conv` wants in codes. Raises LongtakeError without a calibration."""
    if how == "bf16":
        return {}
    if calibration is None:
        raise LongtakeError(f"vae_conv: {how} needs calibrated convolutions", got="a VAE without", fix=FIX)
    layers = codable(vae)
    calibration.require(list(layers), "")
    chosen = chosen_codes(vae.config, how, calibration)
    return {
        name: CodedConv(layers[name].weight, codes, calibration.inputs[name].peak) for name, codes in chosen.items()
    }


class Watched:
    """Notes the inputs of a VAE's codable convolutions while it decodes, as `with Watched(vae) as seen:`."""

    def __init__(self, vae: CausalVAE) -> None:
        self.layers = codable(vae)
        self._peak = dict.fromkeys(self.layers, 0.0)
        self._squares = dict.fromkeys(self.layers, 0.0)
        self._count = dict.fromkeys(self.layers, 0)

    def __enter__(self) -> Watched:
        self._hooks = [m.register_forward_pre_hook(self._hook(name)) for name, m in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0].detach().float()
            self._peak[name] = max(self._peak[name], float(x.abs().max()))
            self._squares[name] += float(x.square().sum(dtype=torch.float64))
            self._count[name] += x.numel()

        return note

    def calibration(self, weights: str = "") -> ConvCalibration:
        """What was seen. Raises IntegrityError for a convolution whose input was nothing but zeros, or not finite."""
        inputs = {
            name: ConvInput(self._peak[name], math.sqrt(self._squares[name] / max(1, self._count[name])))
            for name in self.layers
        }
        found = ConvCalibration(weights, inputs)
        found.require(list(self.layers), "")
        return found


def conv_layers(vae: CausalVAE) -> Iterator[nn.Conv3d]:
    """All of the decoder's convolutions."""
    return (layer for layer in vae.decoder.modules() if isinstance(layer, nn.Conv3d))
