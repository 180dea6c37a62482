"""The ranks of a run as torchrun starts them, and how they are grouped.

Consecutive ranks form a sequence group: they share a sample's tokens. The groups share a batch. Weights are sharded
over all ranks of a host, and replicated over hosts. Read here, and nowhere else, are the variables that torchrun sets:
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longtake.errors import LongtakeError

TIMEOUT = timedelta(minutes=60)  # a rank may wait for rank 0 to write a large checkpoint


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    sequence: ranks that share a sample. group: their process group, None if this rank is alone in it. mesh: what
    weights are sharded over, None where there is one rank only.
    """

    rank: int = 0
    world: int = 1
    sequence: int = 1
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    device: torch.device = torch.device("cpu")

    @property
    def place(self) -> int:
        """Number of this rank in its sequence group."""
        return self.rank % self.sequence

    @property
    def groups(self) -> int:
        """How many sequence groups share a batch."""
        return self.world // self.sequence

    @property
    def my_group(self) -> int:
        return self.rank // self.sequence

    @property
    def first(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """Sum of `x` over all ranks, in a new tensor that has no gradient."""
        x = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def largest(self, value: float) -> float:
        """Maximum of a number over all ranks, on the host: the device isn't waited for."""
        if self.world == 1:
            return value
        x = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return float(x)

    def wait(self) -> None:
        """Wait for all ranks, on the host."""
        self.largest(0.0)


def started_by_torchrun() -> bool:
    """Whether torchrun (or something that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher_variables() -> list[str]:
    """Names of the variables that a launcher set for this process: not for one that starts a launcher of its own."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
           "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
    return [name for name in os.environ if name in own or name.startswith("TORCHELASTIC_")]


@contextmanager
def join_ranks(device_type: str, sequence: int) -> Iterator[Ranks]:
    """Join the other ranks, and leave them at the end. A process that torchrun didn't start is alone.

    Args:
        device_type: "cuda" (NCCL) or "cpu" (gloo).
        sequence: ranks that share a sample.

    Raises:
        LongtakeError: not started by torchrun but asked for several ranks; or their number doesn't divide.
    """
    if not started_by_torchrun():
        require_ranks(1, sequence)
        yield Ranks(device=torch.device(device_type))
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    require_ranks(world, sequence)
    local = int(os.environ.get("LOCAL_RANK", rank))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if device_type == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield ranks_of(device_type, rank, world, local, local_world, sequence)
    finally:
        dist.destroy_process_group()


def ranks_of(device_type: str, rank: int, world: int, local: int, local_world: int, sequence: int) -> Ranks:
    """Groups and meshes; called by all ranks of an initialised default group."""
    samples = init_device_mesh(device_type, (world // sequence, sequence), mesh_dim_names=("batch", "sequence"))
    if world > local_world and world % local_world == 0:
        weights = init_device_mesh(
            device_type, (world // local_world, local_world), mesh_dim_names=("replica", "shard")
        )
    else:
        weights = init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return Ranks(
        rank=rank,
        world=world,
        sequence=sequence,
        group=samples["sequence"].get_group() if sequence > 1 else None,
        mesh=weights,
        device=torch.device("cuda", local) if device_type == "cuda" else torch.device("cpu"),
    )


def require_ranks(world: int, sequence: int) -> None:
    """Raise LongtakeError unless `world` ranks form groups of `sequence`."""
    if sequence < 1 or world % sequence:
        raise LongtakeError(
            f"--sequence-parallel {sequence} doesn't fit {world} rank{'s' if world > 1 else ''}",
            got=f"{world} started",
            expected=f"a multiple of {max(1, sequence)}",
            fix=f"torchrun --nproc-per-node {max(2, sequence)} -m longtake train ... "
            f"--sequence-parallel {max(2, sequence)}",
        )
