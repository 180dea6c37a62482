"""What ranks run on: built engines where they are for as many ranks, else PyTorch; said, and never replaced if asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.torch_modules import TorchModules
from longtake.runtime.parallel.backend import ShardedBackend
from longtake.runtime.parallel.open import require_rank_plans, sharded_backend

log = logging.getLogger(__name__)

PYTORCH = TorchModules.name
Device = torch.device | str | None


def shared_backend(
    recipe: Recipe,
    engines: Path | None,
    checkpoints: Path | None,
    weights: Mapping[str, str],
    asked: str,
    device: Device,
    decode_device: Device,
    gpus: int,
    before: Callable[[Sequence[str]], object] = lambda devices: None,
) -> ShardedBackend:
    """`gpus` ranks that share a stream. engines: the folder of those that are built, if any. weights: digests of theirs.
    before: see sharded_backend.

    Raises:
        LongtakeError: what is asked for is for one GPU alone, or as many cannot share it.
        UnavailableError: engines are asked for and there are none, or GPUs that are not here.
    """
    require_shareable(asked, decode_device, gpus)
    chosen = _chosen_engines(recipe, engines, asked, device, gpus)
    opened = sharded_backend(recipe, checkpoints, gpus, device, engines=chosen, before=before)
    opened.weights = weights if chosen else opened.weights
    log.info("backend: sharded (%s)", opened.reason)
    return opened


def require_shareable(asked: str, decode_device: Device, gpus: int) -> None:
    """Raise LongtakeError for what one GPU alone can be asked for."""
    if asked not in ("auto", PYTORCH, "segmented"):
        raise UnavailableError(
            f"backend {asked} runs on one GPU",
            got=f"--backend {asked} with --gpus {gpus}",
            expected=f"--backend segmented or {PYTORCH}, which several can share",
            fix="leave out --backend, or --gpus",
        )
    if decode_device is not None:
        what, got = "GPUs that share a stream share its VAE, too", f"--decode-device {decode_device}"
        expected, fix = "--gpus alone", "leave out --decode-device, or --gpus"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)


def _chosen_engines(recipe: Recipe, engines: Path | None, asked: str, device: Device, gpus: int) -> Path | None:
    """`engines` if they are asked for, or with "auto" if they are built for as many ranks; None for PyTorch."""
    if asked == "segmented" and engines is None:
        raise UnavailableError(
            "there are no engines to share",
            got="an export that nothing is built from",
            expected=f"engines that are built for {gpus} ranks",
            fix=f"longtake engines --recipe {recipe.name} --gpus {gpus}",
        )
    if asked == "segmented" or engines is None or asked == PYTORCH:
        return engines if asked == "segmented" else None
    try:
        require_rank_plans(engines, gpus, device)
    except UnavailableError as error:
        log.info("PyTorch is shared: %s", error.what)
        return None
    return engines
