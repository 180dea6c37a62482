"""`longtake random-weights`: checkpoints of a preset with random content."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longtake.outputs import claim_checkpoints
from longtake.training.models.presets import PRESETS, preset_named
from longtake.training.random_weights import KINDS, write_random_checkpoints


def register(subparsers: Any) -> None:
    """Add the `random-weights` command."""
    parser = subparsers.add_parser(
        "random-weights",
        help="checkpoints of a preset with random content",
        description="Write checkpoints with random weights, to try exports, builds and checks without trained ones.",
    )
    parser.add_argument("--preset", required=True, metavar="NAME", help=", ".join(sorted(PRESETS)))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=KINDS, help="may be repeated (default: all three)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the files and say where."""
    claim_checkpoints(args.out, {}, args.only or KINDS)
    for path in write_random_checkpoints(preset_named(args.preset), args.out, args.seed, args.only or KINDS):
        print(f"{path}  {path.stat().st_size / 1e9:.2f} GB")
    return 0
