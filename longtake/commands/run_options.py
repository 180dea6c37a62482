"""Options that `longtake train` and `longtake distill` have in common: how long, where, and what is kept."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from typing import Any

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.training.optimizer import OptimizerConfig
from longtake.training.trainer import TrainConfig

# Options that a resumed run may have otherwise without being another one.
ELSEWHERE = {
    "run", "command", "recipe", "out", "resume", "stop_at", "max_seconds", "save_steps", "save_seconds", "save_dtype",
    "evaluate_steps", "sample_steps", "device", "dry_run", "workers", "cache_dir", "max_bad_share", "no_graph", "init",
}  # fmt: skip


def add_saving(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=int, default=1000)
    group.add_argument(
        "--stop-at", type=int, metavar="STEP", help="stop early, resumable, without changing the schedule"
    )
    group.add_argument("--max-seconds", type=float, default=math.inf, help="stop and save when this time is over")
    group.add_argument("--resume", action="store_true", help="go on from the newest resume point in --out")
    group.add_argument("--save-steps", type=int, default=0, metavar="N", help="resume point every N steps")
    group.add_argument(
        "--save-seconds", type=float, default=300, metavar="S", help="... and every S seconds (default 300)"
    )
    group.add_argument("--evaluate-steps", type=int, default=1000, metavar="N", help="held-out metrics every N steps")
    group.add_argument(
        "--sample-steps",
        type=int,
        default=0,
        metavar="N",
        help="sample videos to TensorBoard every N steps (default: with each evaluation)",
    )
    group.add_argument("--save-dtype", default="fp32", choices=("fp32", "bf16"), help="of the final checkpoints")


def train_config(args: argparse.Namespace, optimizer: OptimizerConfig) -> TrainConfig:
    """The loop's settings from the command line."""
    return TrainConfig(
        out=args.out,
        preset=args.preset,
        steps=args.steps,
        seed=args.seed,
        optimizer=optimizer,
        resume=args.resume,
        stop_at=args.stop_at,
        max_seconds=math.inf if args.max_seconds is None else args.max_seconds,
        save_steps=args.save_steps,
        save_seconds=args.save_seconds,
        evaluate_steps=args.evaluate_steps,
        save_dtype=DTYPES[args.save_dtype].torch,
        sample_steps=args.sample_steps,
        command=shlex.join(["longtake", *sys.argv[1:]]),
        settings=settings_of(args),
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What makes a run the one it is, JSON-ready: all options but those of where and how long it runs."""
    kept = {key: value for key, value in vars(args).items() if key not in ELSEWHERE}
    return json.loads(json.dumps(kept, default=str))


def chunk_choices(text: str) -> tuple[int, ...]:
    """ "5", "4..6" or "1,1,5" to the lengths that are drawn from, all equally often."""
    try:
        first, _, last = text.partition("..")
        choices = tuple(range(int(first), int(last) + 1)) if last else tuple(int(part) for part in text.split(","))
    except ValueError:
        choices = ()
    if not choices or min(choices) < 1:
        raise LongtakeError(
            "bad --chunks", got=repr(text), expected="N, N..M with 1 <= N <= M, or N,N,...", fix="--chunks 4..6"
        )
    return choices
