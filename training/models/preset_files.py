"""Presets by what a user gives: the name of a shipped one, or a file of one's own."""

from __future__ import annotations

from pathlib import Path

from longtake.errors import LongtakeError, nearest
from longtake.training.models.families import family_of
from longtake.training.models.presets import PRESETS, Preset, is_file, read_preset


def preset_from_file(path: Path) -> Preset:
    """The preset in a file, named after it.

    Raises:
        LongtakeError: it is no such file, a key or value is not known or cannot be, or a shipped preset has its name.
    """
    preset = read_preset(path, path.resolve().parent)
    family_of(preset)
    shipped = PRESETS.get(preset.name)
    if shipped not in (None, preset):
        raise LongtakeError(f"preset {path} has the name of a shipped one, and says something else", got=preset,
                            expected=shipped, fix="give the file another name")  # fmt: skip
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
