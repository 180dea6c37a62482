"""A rank other than the first: it opens its part of the model and does what it is told, until it is told no more."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.formats.bundle import Bundle
from longtake.formats.recipe import Recipe
from longtake.record import record_from_json
from longtake.runtime.backends.base import State
from longtake.runtime.backends.torch_modules import CheckpointBackend, TorchModules
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.backends.trt.backend import TrtBackend
from longtake.runtime.backends.trt.open import backend_from_engines
from longtake.runtime.bench.random_weights import random_weights
from longtake.runtime.parallel.comm import LOOPBACK, Comm
from longtake.runtime.parallel.processes import is_silence
from longtake.runtime.parallel.rank import ROW_NETWORKS, EngineRank, Rank, RankBackend
from longtake.training.models.network_spec import rank_network

SHARED = ("context", "dit")  # networks of engines that every rank runs, and the decoder where it is built by rows


@dataclass(frozen=True)
class Opening:
    """What a rank is started with, its first line. port: of the first rank's store. threads: of a CPU's rank. dtype: of
    checkpoints as they are; "" for what the recipe makes of them, in fp32. engines: a folder of built ones, in place of
    PyTorch. networks: of them, those that the first rank loads; () for all. made_up: on random weights."""

    recipe: Recipe
    checkpoints: str | None
    rank: int
    world: int
    device: str
    port: int
    patience: float
    threads: int
    dtype: str = ""
    engines: str = ""
    networks: tuple[str, ...] = ()
    made_up: bool = False

    def as_json(self) -> dict[str, Any]:
        """Read back by `record_from_json`."""
        return {**vars(self), "recipe": asdict(self.recipe.whole)}

    def opened(self) -> Rank:
        """This rank's part, its ranks not joined yet."""
        device = torch.device(self.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif self.threads:
            torch.set_num_threads(self.threads)
        checkpoints = Path(self.checkpoints) if self.checkpoints else None
        comm = Comm(self.rank, self.world, device, self.patience)
        if self.engines:
            return EngineRank(self._engines(device, checkpoints, comm), comm)
        inner: TorchModules
        if self.dtype and checkpoints:
            inner = CheckpointBackend(self.recipe.read.model, checkpoints, self.dtype, device)
        else:
            inner = TorchBackend(self.recipe.read, checkpoints=checkpoints, device=device)
        return RankBackend(inner, comm)

    def _engines(self, device: torch.device, checkpoints: Path | None, comm: Comm) -> TrtBackend:
        """Its plans; but for the first rank, those that all run."""
        folder, networks = Path(self.engines), self.networks
        if self.rank:
            built = Bundle.read(folder).files
            rows = f"{rank_network(self.world, 'vae_steady')}.segments.json" in built
            networks = tuple(n for n in (*SHARED, *(ROW_NETWORKS if rows else ())) if not networks or n in networks)
        chosen = networks if self.rank else networks or None  # a rank without a part loads nothing
        options: dict[str, Any] = {"networks": chosen, "checkpoints": checkpoints, "comm": comm}
        if self.made_up:
            onnx = Bundle.read(folder).onnx
            options["weights"] = {name: random_weights(onnx / f"{name}.onnx", device) for name in networks}
        return backend_from_engines("segmented", folder, device, f"one of {self.world} ranks", **options)


class Follower:
    """Does commands, each by the first word of it."""

    def __init__(self, own: Rank) -> None:
        self.own = own
        self.states: dict[int, tuple[str, State]] = {}
        self.kept: dict[int, Tensor] = {}
        self.made: Mapping[str, Tensor] = {}

    def do(self, command: Mapping[str, Any]) -> None:
        """One command, after dropping what it says."""
        for number in command.get("drop", ()):
            self.kept.pop(number, None)
        for number in command.get("forget", ()):
            self.states.pop(number, None)
        getattr(self, f"do_{command['do']}")(command)

    def do_new_state(self, command: Mapping[str, Any]) -> None:
        network = command["network"]
        self.states[command["state"]] = network, self.own.new_state(network)

    def do_run(self, command: Mapping[str, Any]) -> None:
        inputs = {name: self._input(about) for name, about in command["inputs"].items()}
        _, state = self.states.get(command["state"], ("", None))
        self.made = self.own.run(command["network"], inputs, state, command["commit"])

    def do_keep(self, command: Mapping[str, Any]) -> None:
        self.kept |= {n: self.made[name] for name, n in command["tensors"].items() if n is not None}
        self.made = {}

    def do_pass_ms(self, command: Mapping[str, Any]) -> None:
        self.own.pass_ms()

    def do_whole(self, command: Mapping[str, Any]) -> None:
        self.own.whole(*self.states[command["state"]])

    def do_load(self, command: Mapping[str, Any]) -> None:
        self.own.load(*self.states[command["state"]], None)

    def _input(self, about: Mapping[str, Any]) -> Tensor:
        if "kept" in about:
            return self.kept[about["kept"]]
        dtype = getattr(torch, about["dtype"])
        if "values" in about:
            return torch.tensor(about["values"], dtype=dtype).reshape(about["shape"])
        tensor = self.own.comm.send_all(torch.empty(about["shape"], dtype=dtype, device=self.own.device))
        if about["keep"] is not None:
            self.kept[about["keep"]] = tensor
        return tensor


def lines() -> Iterator[dict[str, Any]]:
    """What the first rank tells, until it is gone."""
    for line in sys.stdin.buffer:
        yield json.loads(line)


@torch.no_grad()
def main() -> None:
    """The process of a rank. What it says to the first one are lines of JSON; all else goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.WARNING)
    follower = None
    try:
        told = lines()
        opening = record_from_json(Opening, next(told))
        own = opening.opened()
        print(json.dumps({"ready": True}), file=channel, flush=True)
        if next(told, None) is None:  # the first line says that all are ready
            return
        own.comm.join(dist.TCPStore(LOOPBACK, opening.port, opening.world, is_master=False))
        follower = Follower(own)
        for command in told:
            follower.do(command)
    except BaseException as error:
        if follower is None or not is_silence(str(error)):  # else another rank tells why
            traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), file=channel, flush=True)
        os._exit(1)  # not through an exchange that nobody answers
    os._exit(0)
