"""`longtake budget`: what a recipe takes on the GPU, before anything is built or allocated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from longtake.engines.bundle import load_bundle
from longtake.engines.recipe import Recipe, recipe_named
from longtake.runtime.budget import budget_table
from longtake.runtime.budget_check import check_memory
from longtake.runtime.budget_terms import Use, budget_of
from longtake.runtime.errors import LongtakeError
from longtake.runtime.places import ENGINES

EPILOG = """examples:
  longtake budget --recipe wan2.2-ti2v-5b_fp8_sm90
  longtake budget --recipe wan2.2-ti2v-5b_bf16_sm90 --guidance 3 --decode-device cuda:1
  longtake budget --engines engines/build/tiny_w4a16_sm90

Engines that are built make more of the figures exact. With a GPU at hand it is checked as well, and the command fails
if the memory is not free.
"""


def register(subparsers: Any) -> None:
    """Add the `budget` command."""
    parser = subparsers.add_parser(
        "budget",
        help="what a recipe takes on the GPU, before anything is allocated",
        description="Print the memory that a recipe takes on the GPU, term by term.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", metavar="NAME", help="a shipped recipe or a .yaml file")
    parser.add_argument(
        "--engines", type=Path, metavar="FOLDER", help="built engines (default: the recipe's, if built)"
    )
    parser.add_argument("--guidance", type=float, default=None, metavar="S", help="default: the preset's")
    parser.add_argument("--image", action="store_true", help="the video starts from a picture or a clip")
    parser.add_argument("--device", metavar="cuda:N", help="check against this GPU (default: the first, if any)")
    parser.add_argument("--decode-device", metavar="cuda:N", help="the GPU that decodes, if another")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the budget; raise LongtakeError if it doesn't fit the GPU that is there."""
    recipe, engines = _recipe(args)
    guidance = recipe.model.sampling.guidance if args.guidance is None else args.guidance
    use = Use(guided=guidance != 1.0, decode_apart=args.decode_device is not None, encode=args.image, engines=engines)
    budget = budget_of(recipe, use)
    print(json.dumps(budget.as_json(), indent=2) if args.json else budget_table(budget), flush=True)
    if torch.cuda.is_available() or args.device is not None:
        device = cuda_device(args.device or "cuda:0")
        check_memory(recipe, use, device, cuda_device(args.decode_device) if args.decode_device else None)
        if not args.json:
            print(f"it fits on {device}")
    return 0


def _recipe(args: argparse.Namespace) -> tuple[Recipe, Path | None]:
    """The recipe, and its engines where they are built."""
    if args.engines is not None:
        bundle = load_bundle(args.engines)
        if args.recipe is not None and recipe_named(args.recipe).name != bundle.recipe.name:
            raise LongtakeError(f"{args.engines} holds engines of another recipe", got=bundle.recipe.name,
                                expected=args.recipe, fix="leave out --recipe")  # fmt: skip
        return bundle.recipe, args.engines
    if args.recipe is None:
        raise LongtakeError("no recipe was named", expected="--recipe NAME or --engines FOLDER",
                            fix="longtake budget --recipe wan2.2-ti2v-5b_fp8_sm90")  # fmt: skip
    recipe = recipe_named(args.recipe)
    built = ENGINES / recipe.name
    return recipe, built if (built / "bundle.json").is_file() else None


def cuda_device(name: str) -> torch.device:
    """A GPU of this machine. Raises LongtakeError if there is none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LongtakeError("unknown device", got=name, expected="cuda:N", fix="pass cuda:0") from None
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise LongtakeError(f"there is no GPU {name}", got=f"{torch.cuda.device_count()} GPUs here", expected="cuda:N",
                            fix="leave it out, or name a GPU that is there")  # fmt: skip
    return torch.device("cuda", device.index or 0)
