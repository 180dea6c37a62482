"""Open a backend whose stream several ranks share; refuse first what cannot be, before anything is allocated."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from longtake.devices import torch_device
from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.bundle import Bundle
from longtake.formats.recipe import Recipe
from longtake.runtime.parallel.backend import ShardedBackend
from longtake.runtime.parallel.comm import LOOPBACK
from longtake.runtime.parallel.follower import Opening
from longtake.runtime.parallel.processes import SETTINGS, Followers
from longtake.training.models.network_spec import rank_network
from longtake.training.models.presets import Preset

PATIENCE_S = 120.0  # that one rank waits for another within a command
SPLIT_FAMILY = "wan"  # runtime/parallel/networks.py is written for its networks


def sharded_backend(
    recipe: Recipe,
    checkpoints: Path | None,
    gpus: int,
    device: torch.device | str | None = None,
    patience: float = PATIENCE_S,
    dtype: str = "",
    engines: Path | None = None,
    networks: tuple[str, ...] = (),
    made_up: bool = False,
    before: Callable[[Sequence[str]], object] = lambda devices: None,
) -> ShardedBackend:
    """`recipe` on `gpus` ranks of this host, on the plans in `engines` or in PyTorch. device: "cpu" for processes over gloo
    instead of GPUs. dtype, networks, made_up: see follower.Opening. before: is called with the
    ranks' devices before anything is allocated on them, of engines, whose memory is known.

    Raises:
        LongtakeError: the model cannot be shared by as many.
        UnavailableError: they are not there, are not alike, or a rank does not start; or no such engines.
    """
    require_split(recipe.model, gpus)
    if engines is not None:
        require_rank_plans(engines, gpus, device)
    devices = require_devices(gpus, device)
    if engines is not None:
        before(devices)
    with _settings():
        store = _store(gpus)
        threads = max(1, torch.get_num_threads() // gpus) if devices[0] == "cpu" else 0
        place = str(checkpoints) if checkpoints else None
        built = str(engines) if engines else ""
        first = Opening(
            recipe, place, 0, gpus, devices[0], store.port, patience, threads, dtype, built, networks, made_up
        )
        rest = [replace(first, rank=rank, device=devices[rank]).as_json() for rank in range(1, gpus)]
        followers = Followers(rest)
        try:
            own = replace(first, threads=0).opened()
            followers.require_ready()
            followers.tell({"do": "join"})
            try:
                own.comm.join(store)
            except RuntimeError as error:  # torch's own errors of an exchange are
                raise followers.not_ready(followers.why() or str(error).splitlines()[0]) from error
        except BaseException:
            followers.end()
            raise
    over = "NCCL" if own.device.type == "cuda" else "gloo"
    decoder = "the VAE by rows" if own.by_rows else "the VAE on the first: this recipe's decoder is not cut"
    what = "TensorRT's segments" if engines else f"PyTorch in {dtype or 'fp32'}"
    return ShardedBackend(own, followers, f"{what} on {gpus} ranks over {over}, {decoder}")


def _store(ranks: int) -> dist.TCPStore:
    """Where the ranks meet. torch would listen on every network card, and ask nobody for a password."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        LOOPBACK, port, ranks, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def require_split(preset: Preset, gpus: int) -> None:
    """Raise LongtakeError for a model that `gpus` ranks cannot share evenly."""
    if gpus < 2:
        raise LongtakeError("bad --gpus", got=gpus, expected="1, or 2 and more that share a stream", fix="--gpus 2")
    if preset.family != SPLIT_FAMILY:
        raise LongtakeError(
            f"a stream of {preset.name} cannot be shared by several GPUs",
            got=f"--gpus {gpus}, a model of family {preset.family}",
            expected=f"one of family {SPLIT_FAMILY}",
            fix="leave out --gpus",
        )
    sizes = {"heads": preset.dit.heads, "latent frames a chunk": preset.chunk_latents}
    for what, size in sizes.items():
        if size % gpus:
            fits = [str(n) for n in range(2, size + 1) if all(s % n == 0 for s in sizes.values())]
            raise LongtakeError(
                f"{gpus} GPUs cannot share the {what} of {preset.name} evenly",
                got=f"--gpus {gpus}, {size} {what}",
                expected=f"a number that divides {size}",
                fix=f"--gpus {' or '.join(fits)}" if fits else "leave out --gpus",
            )
    if preset.latent_hw[0] < gpus:
        raise LongtakeError(
            f"{gpus} GPUs cannot share the rows of {preset.name}",
            got=f"{preset.latent_hw[0]} latent rows",
            expected=f"{gpus} or more",
            fix="fewer --gpus",
        )


def require_cut(recipe: Recipe, gpus: int) -> None:
    """Raise UnavailableError for engines that cannot be ranks: the exchanges run between segments."""
    if recipe.mode != "segmented":
        raise UnavailableError(
            f"backend {recipe.mode} runs on one GPU",
            got=f"--gpus {gpus}, recipe {recipe.name}",
            expected="a recipe with mode: segmented, whose engines are cut where ranks exchange",
            fix="leave out --gpus, or choose another recipe",
        )


def require_rank_plans(folder: Path, gpus: int, device: torch.device | str | None = None) -> None:
    """Raise LongtakeError unless the engines in `folder` can be `gpus` ranks."""
    bundle = Bundle.read(folder)
    require_cut(bundle.recipe, gpus)
    if device is not None and torch_device(device).type == "cpu":
        raise UnavailableError(
            "engines run on GPUs",
            got=f"--gpus {gpus} --device cpu with backend segmented",
            expected="GPUs, or PyTorch on the CPU",
            fix="--backend torch",
        )
    if f"{rank_network(gpus)}.segments.json" not in bundle.files:
        raise UnavailableError(
            f"the engines in {folder} are not built for {gpus} ranks",
            got=f"--gpus {gpus}, no plans of {rank_network(gpus)}",
            expected="plans of one rank's tokens and heads",
            fix=f"longtake engines --recipe {bundle.recipe.name} --gpus {gpus}",
        )


def require_devices(
    gpus: int,
    device: torch.device | str | None,
    there: int | None = None,
    kind: Callable[[int], object] | None = None,
) -> list[str]:
    """The device of each rank. there, kind: how many GPUs this machine has, and what each is (default: asked of torch).

    Raises:
        UnavailableError: GPUs are missing, or not of one kind.
    """
    if device is not None and torch_device(device).type == "cpu":
        return ["cpu"] * gpus
    if device is not None:
        what, got = "--gpus takes the first GPUs of this machine", f"--device {device}"
        expected, fix = "--device cpu, or none", "choose them with CUDA_VISIBLE_DEVICES"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    there = torch.cuda.device_count() if there is None else there
    if there < gpus:
        raise UnavailableError(
            f"{gpus} GPUs are asked for and {there} are here",
            got=f"--gpus {gpus}",
            expected=f"at most {there}" if there > 1 else "a machine with as many",
            fix="--device cpu runs as many processes on the CPU, to try it out",
        )
    kinds = [(kind or _kind)(index) for index in range(gpus)]
    if other := next((index for index, each in enumerate(kinds) if each != kinds[0]), None):
        raise UnavailableError(
            "GPUs that share a stream must be of one kind",
            got=f"{kinds[0]} and {kinds[other]} (cuda:0, cuda:{other})",
            expected=f"{gpus} that are alike",
            fix="choose them with CUDA_VISIBLE_DEVICES",
        )
    return [f"cuda:{index}" for index in range(gpus)]


def _kind(index: int) -> object:
    about = torch.cuda.get_device_properties(index)
    return f"{about.name}, {about.total_memory >> 30} GiB"


@contextmanager
def _settings() -> Iterator[None]:
    """What gloo and NCCL read of the environment when they start, unless it says otherwise."""
    new = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
