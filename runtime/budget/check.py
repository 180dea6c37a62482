"""Does it fit? The budget beside the memory that the driver says is free, and what would help if it doesn't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from longtake.errors import LongtakeError
from longtake.formats.memory import Budget, Place, Use
from longtake.formats.recipe import Recipe, recipe_named, recipe_names
from longtake.machine.nvml import nvml
from longtake.runtime.budget.use import budget_of
from longtake.runtime.budget.windows import window_bytes

OF_A_SESSION = ("cache", "prompts' K/V", "solver")  # what each session has of its own, by its terms' names
SPARE_BYTES = 1_000_000_000  # left free: what a budget estimates may be more, and others use the GPU, too
ASKED, FITTING = "as asked", "as the memory that is free allows"


def free_memory(device: torch.device) -> tuple[str, int]:
    """A GPU's name and free bytes, by the driver's own account. Allocates nothing there, if NVML can be asked."""
    index = device.index or 0
    properties = torch.cuda.get_device_properties(index)
    name = f"cuda:{index} ({properties.name}, {properties.total_memory / 1e9:.0f} GB)"
    try:
        with nvml() as pynvml:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            return name, int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except Exception:  # NVML raises its own types, and may be missing
        return name, int(torch.cuda.mem_get_info(index)[0])


def windows_that_fit(recipe: Recipe, use: Use, free: int, sessions: int = 1) -> int:
    """Layers whose window may stay laid out in what is left of `free` bytes once `use` has all it takes, and sessions beside
    it their caches. None under guidance: two caches take turns then, and every pass finds the other one's window."""
    size = window_bytes(recipe)
    if not size or use.guided:
        return 0
    budget = budget_of(recipe, replace(use, kept_windows=0))
    own = [
        term for term in budget.terms if any(word in term.name for word in OF_A_SESSION) and term.place == "generate"
    ]
    left = free - budget.peak["generate"] - (sessions - 1) * sum(term.bytes for term in own) - SPARE_BYTES
    return max(0, min(recipe.model.dit.layers, left // size))


def require_no_windows(asked: int | None, why: str) -> None:
    """Raise LongtakeError if windows are asked for where none can be kept."""
    if asked:
        fix, expected = "leave --kept-windows out", "a recipe with 8-bit attention, on one Hopper GPU"
        raise LongtakeError("no window can be kept", got=f"--kept-windows {asked}: {why}", expected=expected, fix=fix)


def kept_windows(
    recipe: Recipe, use: Use, device: torch.device, asked: int | None, sessions: int = 1
) -> tuple[int, str]:
    """How many layers keep their attention's window, and why: as many as are asked for and there can be, or as many as fit
    into what is free on `device` beside all that `use` takes. (0, "") of a recipe that keeps none."""
    if not window_bytes(recipe):
        require_no_windows(asked, f"recipe {recipe.name} lays none out")
        return 0, ""
    if asked is not None:
        return min(asked, recipe.model.dit.layers), ASKED
    return windows_that_fit(recipe, use, free_memory(device)[1], sessions), FITTING


def check_memory(recipe: Recipe, use: Use, device: torch.device, decode_device: torch.device | None = None) -> Budget:
    """The budget of `recipe`, once the GPUs have that much memory free. `use.decode_apart` is worked out here.

    Raises:
        LongtakeError: they don't; says the figures and what would help.
    """
    apart = decode_device is not None and (decode_device.index or 0) != (device.index or 0)
    use = replace(use, decode_apart=apart)
    budget = budget_of(recipe, use)
    free: dict[Place, tuple[str, int]] = {"generate": free_memory(device)}
    if apart and decode_device is not None:
        free["decode"] = free_memory(decode_device)
    if any(needed > free[place][1] for place, needed in budget.peak.items()):  # the fixes take seconds to work out
        require_fits(budget, free, fixes_for(recipe, use, free["generate"][1], torch.cuda.device_count()))
    return budget


def check_ranks(recipe: Recipe, use: Use, devices: Sequence[str]) -> Budget:
    """The budget of the first of `use.ranks` GPUs that share a video, once each of them has that much memory free. Raises
    LongtakeError."""
    budget = budget_of(recipe, use)
    for name, available in map(free_memory, map(torch.device, devices)):
        if budget.peak["generate"] > available:
            require_fits(budget, {"generate": (name, available)}, fixes_for(recipe, use, available, len(devices)))
    return budget


def require_fits(budget: Budget, free: Mapping[Place, tuple[str, int]], fixes: list[str]) -> None:
    """Raise LongtakeError with the figures if a GPU has less memory free than the budget says.

    Args:
        free: name of each GPU used and its free bytes.
        fixes: what would help, the best first.
    """
    for place, needed in budget.peak.items():
        name, available = free[place]
        if needed <= available:
            continue
        own = [term for term in budget.terms if budget.one_gpu or term.place == place]
        largest = sorted(own, key=lambda term: -term.bytes)[:4]
        parts = ", ".join(f"{term.name} {term.bytes / 1e9:.2f}" for term in largest)
        raise LongtakeError(
            f"recipe {budget.recipe} does not fit the memory of {name}",
            got=f"{available / 1e9:.2f} GB free",
            expected=f"{needed / 1e9:.2f} GB: {parts} GB and smaller ones (longtake budget shows all)",
            fix="; or ".join([*fixes, "close what else uses this GPU"]),
        )


def fixes_for(recipe: Recipe, use: Use, free: int, gpus: int) -> list[str]:
    """What would make `recipe` fit into `free` bytes, or bring it nearer to that; the best first."""
    fixes = ["keep fewer windows (--kept-windows 0 keeps none)"] if use.kept_windows else []
    for name, needed in _smaller_recipes(recipe, use):
        if needed <= free:
            fixes.append(f"take recipe {name}, which needs {needed / 1e9:.1f} GB (--engines {name})")
            break
    now = budget_of(recipe, use).peak["generate"]
    if use.guided:
        saved = now - budget_of(recipe, replace(use, guided=False)).peak["generate"]
        fixes.append(f"turn guidance off, which frees {saved / 1e9:.1f} GB (--guidance 1)")
    if use.decode and not use.decode_apart and use.ranks == 1:
        moved = now - budget_of(recipe, replace(use, decode_apart=True)).peak["generate"]
        where = "--decode-device cuda:1" if gpus > 1 else "--decode-device, with a second GPU"
        fixes.append(f"decode on another GPU, which frees {moved / 1e9:.1f} GB ({where})")
    return fixes


def _smaller_recipes(recipe: Recipe, use: Use) -> list[tuple[str, int]]:
    """Recipes of the same preset and GPU that need less, most precise first, with the bytes they need."""
    others = [recipe_named(name) for name in recipe_names()]
    plain = replace(use, engines=None, recorded=())
    mine = budget_of(recipe, plain).peak["generate"]
    fitting = [r for r in others if (r.preset, r.compute_capability) == (recipe.preset, recipe.compute_capability)]
    needed = [(r.name, budget_of(r, plain).peak["generate"]) for r in fitting if r.name != recipe.name]
    return sorted((entry for entry in needed if entry[1] < mine), key=lambda entry: -entry[1])
