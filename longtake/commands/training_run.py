"""What `longtake train` and `longtake distill` share in running a stage."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtake.formats.model_name import checked_name, write_name
from longtake.options import FREE, option, settings_of
from longtake.training.models.presets import Preset
from longtake.training.optimizer import OptimizerConfig
from longtake.training.options import RunOptions
from longtake.training.trainer import TrainConfig


@dataclass(frozen=True)
class WhereOptions:
    """What

    told: what the run was told, by the keys of a run file.
    """

    device: str = option("auto", resume=FREE)
    """auto, cpu, cuda or cuda:N"""
    dry_run: bool = option(False, resume=FREE)
    """print sizes, shapes, memory and cost, and stop"""
    name: str | None = option(None, metavar="NAME", resume=FREE)
    """what the model is called, for `--model NAME` (default: as the folder --out)"""
    told: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise LongtakeError for what a model cannot be called, before the first step."""
        if self.name is not None:
            checked_name(self.name)


def train_config(
    how: RunOptions, preset: Preset, optimizer: OptimizerConfig, where: WhereOptions, *more: Any
) -> TrainConfig:
    """The loop's settings; those of a run that is resumed are compared to those of all that is given."""
    command, settings = shlex.join(["longtake", *sys.argv[1:]]), settings_of(how, where, *more)
    return TrainConfig(
        **vars(how), preset=preset.name, preset_digests=preset.digests, optimizer=optimizer, command=command,
        settings=settings, told=where.told,
    )  # fmt: skip


def conclude(files: Iterable[Path], metrics: Mapping[str, float], note: str = "", name: str | None = None) -> None:
    """Record the model's name, and say what was written, and how good it is."""
    for path in files:
        write_name(path.parent, name)
        print(f"wrote {path}{note}")
    print("evaluation: " + ", ".join(f"{name} {value:.5g}" for name, value in metrics.items()))
