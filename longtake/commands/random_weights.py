"""`longtake random-weights`: checkpoints of a preset with random content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from longtake.options import Command, OneOf, Text, option
from longtake.outputs import claim_checkpoints
from longtake.training.models.families import preset_named
from longtake.training.models.presets import Preset
from longtake.training.random_weights import KINDS, write_random_checkpoints


@dataclass(frozen=True)
class RandomOptions:
    """What"""

    preset: Annotated[Preset, Text(preset_named)] = option(metavar="NAME")
    """sizes of the networks: a shipped preset, or a .yaml file"""
    out: Path = option(metavar="FOLDER")
    """where they are written"""
    seed: int = option(0)
    """of the weights"""
    only: Annotated[tuple[str, ...], OneOf(KINDS)] = option((), repeated=True)
    """this network; may be repeated (default: all three)"""


def run(options: RandomOptions) -> int:
    """Write the files and say where."""
    claim_checkpoints(options.out, {}, options.only or KINDS)
    for path in write_random_checkpoints(options.preset, options.out, options.seed, options.only or KINDS):
        print(f"{path}  {path.stat().st_size / 1e9:.2f} GB")
    return 0


COMMAND = Command(
    run,
    (RandomOptions,),
    "Write checkpoints with random weights, to try exports, builds and checks without trained ones.",
)
