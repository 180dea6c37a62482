"""`longtake train`: train the VAE or the DiT (with its text encoder) from clips."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch

from longtake.commands.run_files import RUNS
from longtake.commands.training_run import WhereOptions, conclude, train_config
from longtake.devices import device_named
from longtake.errors import LongtakeError
from longtake.options import Command, OneOf, option
from longtake.outputs import claim_checkpoints
from longtake.training.data.named import require_dataset
from longtake.training.dry_run import describe
from longtake.training.models.families import family_of
from longtake.training.models.quantize import modelopt
from longtake.training.optimizer import OptimizerConfig
from longtake.training.options import RunOptions
from longtake.training.parallel.ranks import join_ranks, started_by_torchrun
from longtake.training.parts import parts_before, source_of
from longtake.training.resume import require_resume_point
from longtake.training.stages.base import Stage
from longtake.training.stages.options import StageOptions
from longtake.training.trainer import TrainConfig, Trainer

DESCRIPTION = """Train one stage and leave safetensors checkpoints (the averaged weights) in --out.

  --stage vae   the causal video VAE: clips to latents and back
  --stage dit   the causal DiT and the text encoder, by teacher forcing on latents of a frozen VAE;
                --precision nvfp4 trains it with the 4-bit weights and activations it will run with

Beside the checkpoints: loss.json and loss.png, TensorBoard scalars, and resume points. Ctrl-C saves a resume
point; --resume --out FOLDER goes on from there."""

EPILOG = """examples:
  longtake train --stage vae --data digits --steps 20000 --batch 8 --out runs/vae
  longtake train --stage dit --data digits --vae runs/vae --steps 30000 --batch 32 --out runs/dit
  longtake train --stage dit --init runs/dit --precision nvfp4 --lr 1e-4 --steps 3000 --batch 32 --out runs/dit4
  longtake train --config tiny_own_vae --data my_clips          (my_clips/a.mp4 beside a.txt; docs/training.md)
  longtake train --stage dit --data my_clips --init runs/dit --steps 2000 --out runs/mine
  longtake train --resume --out runs/mine
  longtake train --stage dit --init runs/part1 --continued --seed 2 --out runs/part2         (weights only; docs/teacher-forcing.md)
  tensorboard --logdir runs
"""


@dataclass(frozen=True)
class WhatOptions(WhereOptions):
    """What"""

    stage: Annotated[str, OneOf(("vae", "dit"))] = option()
    """what is trained: the VAE, or the DiT with its text encoder"""


@dataclass(frozen=True)
class RankOptions:
    """Several GPUs (torchrun -m longtake train ...; docs/multi-gpu.md)"""

    sequence_parallel: int = option(1, metavar="N")
    """stage dit: ranks that share a sample's tokens; groups of N ranks share a batch"""
    sp_mode: Annotated[str, OneOf(("balanced", "naive"))] = option("balanced")
    """each rank holds clean and noisy half of the same chunks, or (naive) all clean ones stand before all noisy ones and
    are cut into parts"""


def run(
    what: WhatOptions, how: RunOptions, options: StageOptions, optimizer: OptimizerConfig, ranks: RankOptions
) -> int:
    """Train as told; returns the exit code."""
    config = train_config(how, options.preset, optimizer, what, options, optimizer, ranks)
    parts = parts_before(what.stage, options, optimizer)
    config = replace(config, parts=parts, source=source_of(what.stage, options.init))
    if what.stage == "dit" and is_world(options):
        from longtake.training.stages.world import require_world

        require_world(options, how.sample_steps)
    if config.resume:
        require_resume_point(config.out)
    if what.dry_run:
        print("\n".join(describe(what.stage, options)))
        return 0
    require_dataset(options.data)
    kinds = ("vae",) if what.stage == "vae" else ("dit", "text_encoder")
    vae = options.vae and options.vae / "vae.safetensors"
    claim_checkpoints(config.out, {"--init": options.init, "--vae": vae}, kinds)
    if what.stage == "dit":
        modelopt()  # measures amax at the end: what is missing is said now
    if ranks.sequence_parallel != 1 or started_by_torchrun():
        return run_parallel(what, config, options, ranks)
    torch.manual_seed(how.seed)
    stage = stage_named(what.stage, options)
    device = device_named(what.device)
    print(f"training {what.stage} of preset {config.preset} on {device} for {config.steps} steps, into {config.out}")
    if parts:
        before = sum(part["steps"] or 0 for part in parts)
        print(f"part {len(parts) + 1} of a run that made {before} steps before: a new optimizer, with its warm-up")
    if stage.line:
        print(stage.line)
    metrics = Trainer(stage, config, device).fit()
    conclude((config.out / f"{name}.safetensors" for name in stage.modules), metrics, name=what.name)
    return 0


def stage_named(name: str, options: StageOptions) -> Stage:
    """A stage, ready to be prepared."""
    from longtake.training.stages.dit import DiTStage
    from longtake.training.stages.vae import VAEStage
    from longtake.training.stages.world import WorldStage

    return {"dit": WorldStage if is_world(options) else DiTStage, "vae": VAEStage}[name](options)


def is_world(options: StageOptions) -> bool:
    """Whether what is trained follows cameras."""
    return "camera" in family_of(options.preset).can


def run_parallel(what: WhatOptions, config: TrainConfig, options: StageOptions, asked: RankOptions) -> int:
    """`longtake train --stage dit` under torchrun. Returns the exit code.

    Raises:
        LongtakeError: another stage, or ranks that fit neither each other nor the model.
    """
    from longtake.training.parallel.stage import ParallelDiTStage
    from longtake.training.parallel.trainer import ParallelTrainer, records_of, threads_of

    if what.stage != "dit":
        raise LongtakeError(
            "this stage trains on one rank",
            got=f"--stage {what.stage} under torchrun or with --sequence-parallel",
            expected="--stage dit",
            fix="start it without torchrun",
        )
    if is_world(options):
        raise LongtakeError(
            "a world trains on one rank",
            got=f"preset {options.preset.name} under torchrun or with --sequence-parallel",
            expected="a preset without cameras",
            fix="start it without torchrun",
        )
    device = device_named(what.device)
    with join_ranks(device.type, asked.sequence_parallel) as ranks, records_of(ranks) as scratch:
        threads_of(ranks)
        torch.manual_seed(config.seed)
        stage = ParallelDiTStage(options, ranks, asked.sp_mode)
        shape = {"ranks": ranks.world, "sequence_parallel": ranks.sequence, "sp_mode": asked.sp_mode}
        print(
            f"training {what.stage} of preset {options.preset.name} on {ranks.world} ranks ({ranks.groups} groups of "
            f"{ranks.sequence}, {asked.sp_mode}), {ranks.device.type}, for {config.steps} steps, into {config.out}"
        )
        if stage.line:
            print(stage.line)
        metrics = ParallelTrainer(stage, replace(config, settings={**config.settings, **shape}), ranks, scratch).fit()
        conclude((config.out / f"{name}.safetensors" for name in stage.modules), metrics, name=what.name)
    return 0


COMMAND = Command(
    run, (WhatOptions, RunOptions, StageOptions, OptimizerConfig, RankOptions), DESCRIPTION, EPILOG, runs=RUNS / "train"
)
