"""What `longtake bench parallel` is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from longtake.options import OneOf, Text, option
from longtake.training.models.families import preset_named
from longtake.training.models.presets import WAN22_TI2V_5B, Preset
from longtake.training.parallel.layout import MODES, NONE

WAYS = (*MODES, NONE)


@dataclass(frozen=True)
class ParallelBenchOptions:
    """What"""

    preset: Annotated[Preset, Text(preset_named, lambda preset: preset.name)] = option(WAN22_TI2V_5B, metavar="NAME")
    """sizes of the networks, by name"""
    layers: int = option(8, metavar="N")
    """depth of the transformer; widths are the preset's"""
    height: int | None = option(None, metavar="PIXELS")
    """of the clip (default: the preset's)"""
    width: int | None = option(None, metavar="PIXELS")
    """of the clip (default: the preset's)"""
    seconds: tuple[float, ...] = option((16.0, 32.0), metavar="S")
    """lengths of the clip"""
    modes: Annotated[tuple[str, ...], OneOf(WAYS)] = option(WAYS)
    """ways of sharing a sample, or none"""
    iterations: int = option(3, metavar="N")
    """timed, where time allows; one at least"""
    warmup: int = option(1, metavar="N")
    """0 for none; the first has all shapes and as much memory, but little work"""
    vae: bool = option(True)
    """latents are there already"""
    halo: Annotated[str, OneOf(("even", "equal"))] = option("even")
    """balanced: latents that each rank encodes (even) or keeps (equal, as in the reference) are as many on every rank"""
    attention: Annotated[str, OneOf(("blocks", "flex"))] = option("blocks")
    """block by block, or FlexAttention"""
    fp32: bool = option(False)
    """compute in fp32"""
    longest: float | None = option(None, metavar="S")
    """after that, in steps of 8 s and up to S seconds, the longest clip that each mode fits: iterations with a real one's
    memory and little work (default: not sought)"""
    budget_seconds: float = option(240.0, metavar="S")
    """time for everything; what isn't measured by then is left out"""
    device: Annotated[str, OneOf(("cuda", "cpu"))] | None = option(None)
    """where (default: cuda if there is a GPU)"""
    nproc: int | None = option(None, metavar="N")
    """ranks, where torchrun didn't start this (default: as many as GPUs)"""
    out: Path | None = option(None, metavar="FILE")
    """write the report there, too (default: it is printed only)"""
    rehearse_oom: str = option("", hidden=True)
    """the last rank of this mode fails"""

    @property
    def on(self) -> str:
        """The kind of device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float32 if self.fp32 else torch.bfloat16

    @property
    def sized(self) -> Preset:
        """The preset, cut to size."""
        preset = self.preset
        dit = replace(preset.dit, layers=self.layers or preset.dit.layers)
        return replace(preset, dit=dit, height=self.height or preset.height, width=self.width or preset.width)
