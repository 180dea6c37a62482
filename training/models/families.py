"""Families and presets by name: the registry of families, one line each, and presets that are shipped or files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from longtake.errors import LongtakeError, nearest
from longtake.training.models.family import Family
from longtake.training.models.presets import PRESETS, Preset, is_file, read_preset
from longtake.training.models.sana_wm.family import SanaWM
from longtake.training.models.wan.family import Wan

FAMILIES: dict[str, Family] = {
    "wan": Wan(),
    "sana_wm": SanaWM(),
}


def family_named(name: str) -> Family:
    """The family called `name`; an unknown name is an error that lists the known ones."""
    if name not in FAMILIES:
        fix = "set the preset's family to one of these"
        raise LongtakeError("unknown family", got=name, expected=", ".join(sorted(FAMILIES)), fix=fix)
    return FAMILIES[name]


def linears_of(dit: nn.Module) -> list[str]:
    """Names of the linears of a transformer that recipes quantize."""
    return family_named(str(dit.family)).linears(dit)


def family_of(preset: Preset) -> Family:
    """The family of `preset`."""
    return family_named(preset.family)


def preset_from_file(path: Path) -> Preset:
    """The preset in a file, named after it.

    Raises:
        LongtakeError: it is no such file, a key or value is not known or cannot be, or a shipped preset has its name.
    """
    preset = read_preset(path, path.resolve().parent)
    family_of(preset)
    shipped = PRESETS.get(preset.name)
    if shipped not in (None, preset):
        what = f"preset {path} has the name of a shipped one, and says something else"
        raise LongtakeError(what, got=preset, expected=shipped, fix="give the file another name")
    return preset


def preset_named(name: str, folder: Path = Path()) -> Preset:
    """A shipped preset by name, or any preset file by path, seen from `folder`.

    Raises:
        LongtakeError: there is no such preset, which lists the shipped ones; or see `preset_from_file`.
    """
    if name.endswith((".yaml", ".yml")) and is_file(folder / name):
        return preset_from_file(folder / name)
    if name not in PRESETS:
        expected, fix = [*sorted(PRESETS), "or a .yaml file"], nearest(name, PRESETS, "pass one of these")
        raise LongtakeError("unknown preset", got=name, expected=", ".join(expected), fix=fix)
    return PRESETS[name]
