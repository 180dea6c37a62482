"""`longtake budget`: what a recipe takes on the GPU, before anything is built or allocated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe, recipe_named
from longtake.runtime.budget.check import check_memory
from longtake.runtime.budget.terms import Use, budget_of
from longtake.runtime.budget.terms_table import budget_table
from longtake.runtime.sources import source_from_bundle, source_of_recipe
from longtake.training.models.presets import SamplingConfig

EPILOG = """examples:
  longtake budget --recipe wan2.2-ti2v-5b_fp8_sm90
  longtake budget --recipe wan2.2-ti2v-5b_bf16_sm90 --guidance 3 --decode-device cuda:1
  longtake budget --engines engines/build/tiny_w4a16_sm90

Engines that are built make more of the figures exact. Guidance other than 1 takes a second K/V cache; the export of a
distilled student records that it is sampled without. With a GPU at hand it is checked as well, and the command fails if
the memory is not free.
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
    parser.add_argument("--guidance", type=float, default=None, metavar="S",
                        help="guidance scale (default: as the export records, else the preset's)")  # fmt: skip
    parser.add_argument("--image", action="store_true", help="the video starts from a picture or a clip")
    parser.add_argument("--device", metavar="cuda:N", help="check against this GPU (default: the first, if any)")
    parser.add_argument("--decode-device", metavar="cuda:N", help="the GPU that decodes, if another")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the budget; raise LongtakeError if it doesn't fit the GPU that is there."""
    recipe, engines, recorded = _recipe(args)
    guidance, whose = _guidance(args.guidance, recipe, recorded)
    use = Use(guided=guidance != 1.0, decode_apart=args.decode_device is not None, encode=args.image, engines=engines)
    budget = budget_of(recipe, use)
    if args.json:
        print(json.dumps({**budget.as_json(), "guidance": guidance}, indent=2), flush=True)
    else:
        print(f"{budget_table(budget)}\nguidance {guidance:g} ({whose})", flush=True)
    if torch.cuda.is_available() or args.device is not None:
        device = cuda_device(args.device or "cuda:0")
        check_memory(recipe, use, device, cuda_device(args.decode_device) if args.decode_device else None)
        if not args.json:
            print(f"it fits on {device}")
    return 0


def _guidance(asked: float | None, recipe: Recipe, recorded: SamplingConfig | None) -> tuple[float, str]:
    """The scale that sessions will have, as when they are opened, and where it is from."""
    if asked is not None:
        return asked, "as asked"
    if recorded is not None:
        return recorded.guidance, "as the export records"
    return recipe.model.sampling.guidance, "the preset's"


def _recipe(args: argparse.Namespace) -> tuple[Recipe, Path | None, SamplingConfig | None]:
    """The recipe; its engines where they are built; how what is built or exported is sampled, where that is recorded."""
    if args.engines is not None:
        source = source_from_bundle(args.engines)
        if args.recipe is not None and recipe_named(args.recipe).name != source.recipe.name:
            raise LongtakeError(f"{args.engines} holds engines of another recipe", got=source.recipe.name,
                                expected=args.recipe, fix="leave out --recipe")  # fmt: skip
        return source.recipe, args.engines, source.sampling
    if args.recipe is None:
        raise LongtakeError("no recipe was named", expected="--recipe NAME or --engines FOLDER",
                            fix="longtake budget --recipe wan2.2-ti2v-5b_fp8_sm90")  # fmt: skip
    recipe = recipe_named(args.recipe)
    found = source_of_recipe(recipe)
    return (recipe, None, None) if found is None else (recipe, found.engines, found.sampling)


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
