"""`longtake budget`: what a recipe takes on the GPU, before anything is built or allocated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from longtake.devices import torch_device
from longtake.errors import LongtakeError
from longtake.formats.memory import Use, budget_table
from longtake.formats.model_name import models_with
from longtake.formats.recipe import Recipe, recipe_named
from longtake.options import Bounds, Command, check, option
from longtake.runtime.budget.check import check_memory, check_ranks
from longtake.runtime.budget.use import budget_of
from longtake.runtime.parallel.open import require_cut, require_devices, require_split
from longtake.runtime.sources import Source, source_from_bundle, source_from_name, source_of_recipe
from longtake.training.models.presets import SamplingConfig

EPILOG = """examples:
  longtake budget --recipe wan2.2-ti2v-5b_fp8_sm90
  longtake budget --recipe wan2.2-ti2v-5b_bf16_sm90 --guidance 3 --decode-device cuda:1
  longtake budget --recipe wan2.2-ti2v-5b_fp8_sm90 --gpus 2
  longtake budget --engines build/models/tiny-4step/tiny_w4a16_sm90/engines

Engines that are built make more of the figures exact. Guidance other than 1 takes a second K/V cache; the export of a
distilled student records that it is sampled without. With a GPU at hand it is checked as well, and the command fails if
the memory is not free.
"""


@dataclass(frozen=True)
class BudgetOptions:
    """What"""

    recipe: str | None = option(None, metavar="NAME")
    """a shipped recipe or a .yaml file (default: that of --engines)"""
    engines: Path | None = option(None, metavar="FOLDER")
    """engines or exported networks, or MODEL@RECIPE (default: what the only model with the recipe has)"""
    guidance: float | None = option(None, metavar="S")
    """guidance scale (default: as the export records, else the preset's)"""
    image: bool = option(False)
    """the video starts from a picture or a clip"""
    device: str | None = option(None, metavar="cuda:N")
    """check against this GPU (default: the first, if any)"""
    decode_device: str | None = option(None, metavar="cuda:N")
    """the GPU that decodes (default: the same)"""
    gpus: Annotated[int, Bounds(1)] = option(1, metavar="P")
    """GPUs that share the video: what the first of them takes, which takes the most (docs/multi-gpu.md)"""
    json: bool = option(False)
    """print JSON"""

    def __post_init__(self) -> None:
        """Raise LongtakeError for what is out of bounds, and for two ways to use a second GPU."""
        check(self)
        if self.gpus > 1 and (self.decode_device or self.device):
            raise LongtakeError(
                "GPUs that share a video share its VAE, too, and are the first of this machine",
                got=f"--gpus {self.gpus} with {'--decode-device' if self.decode_device else '--device'}",
                expected="--gpus alone",
                fix="leave one out",
            )


def run(options: BudgetOptions) -> int:
    """Print the budget; raise LongtakeError if it doesn't fit the GPU that is there."""
    recipe, source = _recipe(options)
    if options.gpus > 1:
        require_split(recipe.model, options.gpus)
        require_cut(recipe, options.gpus)
    guidance, whose = _guidance(options.guidance, recipe, source.sampling if source else None)
    use = Use(
        guided=guidance != 1.0,
        decode_apart=options.decode_device is not None,
        encode=options.image,
        engines=source.engines if source else None,
        recorded=source.memory if source else (),
        ranks=options.gpus,
    )
    budget = budget_of(recipe, use)
    if options.json:
        print(json.dumps({**budget.as_json(), "guidance": guidance}, indent=2), flush=True)
    else:
        print(f"{budget_table(budget)}\nguidance {guidance:g} ({whose})", flush=True)
    if options.gpus > 1 and torch.cuda.is_available():
        check_ranks(recipe, use, require_devices(options.gpus, None))
    elif torch.cuda.is_available() or options.device is not None:
        device = cuda_device(options.device or "cuda:0")
        check_memory(recipe, use, device, cuda_device(options.decode_device) if options.decode_device else None)
        if not options.json:
            print(f"it fits on {device}")
    return 0


def _guidance(asked: float | None, recipe: Recipe, recorded: SamplingConfig | None) -> tuple[float, str]:
    """The scale that sessions will have, as when they are opened, and where it is from."""
    if asked is not None:
        return asked, "as asked"
    if recorded is not None:
        return recorded.guidance, "as the export records"
    return recipe.model.sampling.guidance, "the preset's"


def _recipe(options: BudgetOptions) -> tuple[Recipe, Source | None]:
    """The recipe, and what is built or exported of it, if anything is."""
    if options.engines is not None:
        known = options.engines.is_dir() or "@" in options.engines.name  # else the folder is missed by its name
        source = source_from_name(options.engines) if known else source_from_bundle(options.engines)
        asked = source.recipe if options.recipe is None else recipe_named(options.recipe)
        source.recipe.require_same(asked, options.engines)
        if asked.name != source.recipe.name:
            what, got = f"{options.engines} holds engines of another recipe", source.recipe.name
            expected, fix = options.recipe, "leave out --recipe"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
        return source.recipe, source
    if options.recipe is None:
        raise LongtakeError(
            "no recipe was named",
            expected="--recipe NAME or --engines FOLDER",
            fix="longtake budget --recipe wan2.2-ti2v-5b_fp8_sm90",
        )
    recipe = recipe_named(options.recipe)
    return recipe, source_of_recipe(recipe) if len(models_with(recipe.name)) == 1 else None


def cuda_device(name: str) -> torch.device:
    """A GPU of this machine. Raises LongtakeError if there is none of that name."""
    device = torch_device(name, expected="cuda:N")
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        what, got = f"there is no GPU {name}", f"{torch.cuda.device_count()} GPUs here"
        expected, fix = "cuda:N", "leave it out, or name a GPU that is there"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return torch.device("cuda", device.index or 0)


COMMAND = Command(run, (BudgetOptions,), "Print the memory that a recipe takes on the GPU, term by term.", EPILOG)
