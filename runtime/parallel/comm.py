"""The exchanges among the ranks that share one stream: over NCCL on GPUs, over gloo on a CPU. All ranks call alike.

None waits on the host for a GPU, so that a pass with its exchanges can be captured in a CUDA graph; `settle` does.
Legend: B batch, L tokens, H heads, D head_dim, P ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.errors import UnavailableError
from longtake.training.models.ulysses import gather_heads, gather_tokens

POLL_S = 0.0005
LEAVE_S = 10.0
LOOPBACK = "127.0.0.1"


def shares(size: int, ranks: int) -> list[int]:
    """How many of `size` rows each rank has: as equal as can be, the first ones more."""
    return [size // ranks + (rank < size % ranks) for rank in range(ranks)]


class Comm:
    """This rank among the others, once `join` was called. patience: seconds that it waits for another one."""

    def __init__(self, rank: int, world: int, device: torch.device, patience: float) -> None:
        self.rank, self.world, self.device, self.patience = rank, world, device, patience

    def join(self, store: dist.Store) -> None:
        """Meet the others; the first one's `store` is where."""
        if dist.is_initialized():
            raise UnavailableError(
                "this process is a rank of something else already",
                got="a process group of torch.distributed",
                expected="one stream on several GPUs a process",
                fix="close the other generator first",
            )
        cuda = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world,
            # NCCL's own watchdog ends the whole process: `settle` must come first
            timeout=timedelta(seconds=self.patience * (4 if cuda else 1)),
            device_id=self.device if cuda else None,
        )

    def leave(self, broken: bool = False) -> None:
        """Leave the others. broken: one is lost, so nothing is waited for. NCCL may wait for ranks that are gone: not for ever."""
        if not dist.is_initialized():
            return
        if self.device.type != "cuda":
            dist.destroy_process_group()
            return
        end = dist.distributed_c10d._abort_process_group if broken else dist.destroy_process_group
        leaving = threading.Thread(target=end, daemon=True)
        leaving.start()
        leaving.join(LEAVE_S)

    def gather_tokens(self, x_BLHD: Tensor) -> Tensor:
        """[B, L / P, H, D] of this rank's tokens to [B, L, H / P, D] of its heads."""
        return gather_tokens(x_BLHD, dist.group.WORLD)

    def gather_heads(self, x_BLHD: Tensor) -> Tensor:
        """The way back."""
        return gather_heads(x_BLHD, dist.group.WORLD)

    def trade_tokens(self, xs: Sequence[Tensor], outs: Sequence[Tensor], staged: Sequence[Tensor]) -> None:
        """`gather_tokens` without batch of several at once, each [L, H, D], into memory that is there: `outs`, and `staged` of
        the sizes of `xs`, where what goes to one rank is put side by side."""
        sent = []
        for x, stage in zip(xs, staged, strict=True):
            by_rank = x.unflatten(1, (self.world, -1)).transpose(0, 1)
            sent.append(stage.view(by_rank.shape))
            sent[-1].copy_(by_rank)
        self._trade(sent, [out.unflatten(0, (self.world, -1)) for out in outs])

    def trade_heads(self, xs: Sequence[Tensor], outs: Sequence[Tensor], staged: Sequence[Tensor]) -> None:
        """The way back, from [P L, H / P, D]."""
        sent = [x.unflatten(0, (self.world, -1)) for x in xs]
        received = [stage.view(by_rank.shape) for stage, by_rank in zip(staged, sent, strict=True)]
        self._trade(sent, received)
        for out, by_rank in zip(outs, received, strict=True):
            out.unflatten(1, (self.world, -1)).copy_(by_rank.transpose(0, 1))

    def trade_rows(self, x: Tensor, ghost: int, staged: Sequence[Tensor]) -> None:
        """Renew the ghost rows of x [T, G + rows + G, X, C] in place: the neighbours' outermost rows, zeros at the picture's edge.
        staged: memory for four times [T, G, X, C]: what goes to the rank before and behind, and comes from them."""
        mine, (first, last, above, below) = x.narrow(1, ghost, x.shape[1] - 2 * ghost), staged
        ops = []
        if self.rank > 0:
            first.copy_(mine[:, :ghost])
            ops += [dist.P2POp(dist.isend, first, self.rank - 1), dist.P2POp(dist.irecv, above, self.rank - 1)]
        if self.rank < self.world - 1:
            last.copy_(mine[:, mine.shape[1] - ghost :])
            ops += [dist.P2POp(dist.irecv, below, self.rank + 1), dist.P2POp(dist.isend, last, self.rank + 1)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        for place, given, there in (
            (x[:, :ghost], above, self.rank > 0),
            (x[:, x.shape[1] - ghost :], below, self.rank < self.world - 1),
        ):
            place.copy_(given) if there else place.zero_()

    def take_rows(self, x: Tensor, ghost: int, out: Tensor) -> None:
        """This rank's rows of whole frames x [T, Y, X, C] with their ghost rows, to `out` [T, Y / P + 2 G, X, C]."""
        rows = x.shape[1] // self.world
        begin, end = rows * self.rank - ghost, rows * (self.rank + 1) + ghost
        out.zero_()
        inside = x[:, max(begin, 0) : min(end, x.shape[1])]
        out[:, max(-begin, 0) :][:, : inside.shape[1]].copy_(inside)

    def _trade(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Row i of each of `sent` [P, ...] goes to rank i, and row i of each of `received` comes from it: in one group."""
        ops = []
        for peer in range(self.world):
            for mine, theirs in zip(sent, received, strict=True):
                if peer == self.rank:
                    theirs[peer].copy_(mine[peer])
                else:
                    ops += [dist.P2POp(dist.isend, mine[peer], peer), dist.P2POp(dist.irecv, theirs[peer], peer)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def largest(self, x: Tensor) -> Tensor:
        """`x` with the largest of all ranks, written over."""
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def send_all(self, x: Tensor) -> Tensor:
        """The first rank's `x` on all; the others' is written over. It is contiguous."""
        dist.broadcast(x, 0)
        return x

    def rows_around(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """The last row of the rank before and the first one of the rank after; zeros at the picture's edge."""
        first, last = x.narrow(axis, 0, 1).contiguous(), x.narrow(axis, x.shape[axis] - 1, 1).contiguous()
        above, below = torch.zeros_like(first), torch.zeros_like(last)
        ops = []
        if self.rank > 0:
            ops += [dist.P2POp(dist.isend, first, self.rank - 1), dist.P2POp(dist.irecv, above, self.rank - 1)]
        if self.rank < self.world - 1:
            ops += [dist.P2POp(dist.irecv, below, self.rank + 1), dist.P2POp(dist.isend, last, self.rank + 1)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return above, below

    def joined(self, x: Tensor, axis: int, parts: Sequence[int]) -> Tensor:
        """All ranks' `x` one after another along `axis`, on every rank. parts: how long each is, in any unit."""
        mine = self._padded(x, axis, parts)
        rows = [torch.empty_like(mine) for _ in parts]
        dist.all_gather(rows, mine)
        return self._cut(rows, axis, parts, x.shape[axis] // parts[self.rank])

    def collected(self, x: Tensor, axis: int, parts: Sequence[int]) -> Tensor:
        """The same on the first rank alone; the others get their own part back."""
        mine = self._padded(x, axis, parts)
        rows = [torch.empty_like(mine) for _ in parts] if self.rank == 0 else None
        dist.gather(mine, rows, 0)
        return x if rows is None else self._cut(rows, axis, parts, x.shape[axis] // parts[self.rank])

    def part(self, x: Tensor, axis: int, parts: Sequence[int]) -> Tensor:
        """This rank's part of a whole `x`, a view."""
        unit = x.shape[axis] // sum(parts)
        return x.narrow(axis, unit * sum(parts[: self.rank]), unit * parts[self.rank])

    def settle(self) -> None:
        """Wait for the GPU; an exchange that never ends is found out by the time.

        Raises:
            TimeoutError: it took longer than `patience`.
        """
        if self.device.type != "cuda":
            return  # gloo's exchanges end, or raise, before they return
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        end = time.monotonic() + self.patience
        while not done.query():
            if time.monotonic() > end:
                raise TimeoutError(f"no answer within {self.patience:g} s")
            time.sleep(POLL_S)

    def _padded(self, x: Tensor, axis: int, parts: Sequence[int]) -> Tensor:
        """Exchanges want parts of one size: as long as the longest."""
        lacking = x.shape[axis] // parts[self.rank] * (max(parts) - parts[self.rank])
        if not lacking:
            return x.contiguous()
        return torch.cat([x, x.new_zeros((*x.shape[:axis], lacking, *x.shape[axis + 1 :]))], axis)

    def _cut(self, rows: Sequence[Tensor], axis: int, parts: Sequence[int], unit: int) -> Tensor:
        return torch.cat([row.narrow(axis, 0, unit * part) for row, part in zip(rows, parts, strict=True)], axis)
