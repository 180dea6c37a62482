"""`longtake train` on many ranks."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from longtake.errors import LongtakeError
from longtake.training.parallel.ranks import join_ranks
from longtake.training.parallel.stage import ParallelDiTStage
from longtake.training.parallel.trainer import ParallelTrainer, records_of, threads_of
from longtake.training.stages.base import StageOptions
from longtake.training.trainer import TrainConfig


def run_parallel(
    args: argparse.Namespace,
    config: TrainConfig,
    options: StageOptions,
    device: torch.device,
) -> int:
    """`longtake train --stage dit` under torchrun. Returns the exit code.

    Raises:
        LongtakeError: another stage, or ranks that fit neither each other nor the model.
    """
    if args.stage != "dit":
        raise LongtakeError("this stage trains on one rank", got=f"--stage {args.stage} under torchrun or with "
                            "--sequence-parallel", expected="--stage dit", fix="start it without torchrun")  # fmt: skip
    with join_ranks(device.type, args.sequence_parallel) as ranks, records_of(ranks) as scratch:
        threads_of(ranks)
        torch.manual_seed(args.seed)
        stage = ParallelDiTStage(options, ranks, args.sp_mode)
        shape = {"ranks": ranks.world, "sequence_parallel": ranks.sequence, "sp_mode": args.sp_mode}
        print(f"training {args.stage} of preset {options.preset.name} on {ranks.world} ranks ({ranks.groups} groups of "
              f"{ranks.sequence}, {args.sp_mode}), {ranks.device.type}, for {config.steps} steps, into {config.out}")  # fmt: skip
        metrics = ParallelTrainer(stage, replace(config, settings={**config.settings, **shape}), ranks, scratch).fit()
        for name in stage.modules:
            print(f"wrote {config.out / name}.safetensors")
        print("held out: " + ", ".join(f"{name} {value:.5g}" for name, value in metrics.items()))
    return 0
