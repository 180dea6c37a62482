"""The registry of families: one line each."""

from __future__ import annotations

from torch import nn

from longtake.errors import LongtakeError
from longtake.training.models.family import Family
from longtake.training.models.presets import Preset
from longtake.training.models.sana_wm.family import SanaWM
from longtake.training.models.wan.family import Wan

FAMILIES: dict[str, Family] = {
    "wan": Wan(),
    "sana_wm": SanaWM(),
}


def family_named(name: str) -> Family:
    """The family called `name`; an unknown name is an error that lists the known ones."""
    if name not in FAMILIES:
        raise LongtakeError("unknown family", got=name, expected=", ".join(sorted(FAMILIES)),
                            fix="set the preset's family to one of these")  # fmt: skip
    return FAMILIES[name]


def linears_of(dit: nn.Module) -> list[str]:
    """Names of the linears of a transformer that recipes quantize."""
    return family_named(str(dit.family)).linears(dit)


def family_of(preset: Preset) -> Family:
    """The family of `preset`."""
    return family_named(preset.family)
