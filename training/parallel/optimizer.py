"""AdamW and EMA of sharded weights: state stays sharded, and is gathered tensor by tensor for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longtake.training.optimizer import Averaged, OptimizerConfig, restore_modules, snapshot_modules
from longtake.training.parallel.ranks import Ranks
from longtake.training.parallel.sharding import copy_whole, own_shards, whole


class ShardedAveraged(Averaged):
    """`optimizer.Averaged` for FSDP2's parameters. `state` and `load_state` speak of whole tensors, as one rank does."""

    def __init__(self, modules: dict[str, nn.Module], config: OptimizerConfig, ranks: Ranks) -> None:
        super().__init__(modules, config)
        self.ranks = ranks
        self.ema = [shard.float().clone() for shard in own_shards(self.params)]

    def step(self, step: int, steps: int) -> Tensor:
        """As `Averaged.step`; the norm is that of the whole gradient, the same on all ranks."""
        norm = whole(nn.utils.clip_grad_norm_(self.params, self.config.clip))
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr_at(step, steps)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, own_shards(self.params), 1 - self.config.ema_at(step))
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, whole, on the first rank; nothing on the others. All must call."""
        found: dict[str, Tensor] = {}
        for name, param, ema in zip(self.names, self.params, self.ema):
            self.keep(found, f"ema/{name}", like(param, ema))
            for key, value in self.adamw.state[param].items():
                self.keep(found, f"adamw/{key}/{name}", value)
        for owner, module in self.modules.items():
            for name, value in module.state_dict().items():
                self.keep(found, f"module/{owner}/{name}", value)
        return found

    def keep(self, found: dict[str, Tensor], name: str, value: Tensor) -> None:
        gathered = whole(value.detach())
        if self.ranks.first:
            found[name] = gathered.cpu().clone()

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave; every rank reads the whole tensors and keeps its shards."""
        for name, param, ema in zip(self.names, self.params, self.ema):
            copy_whole(like(param, ema), tensors[f"ema/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (saved := tensors.get(f"adamw/{key}/{name}")) is not None:
                    empty = (
                        torch.empty_like(param, dtype=saved.dtype)
                        if saved.dim()
                        else torch.empty((), device=param.device)
                    )
                    copy_whole(empty, saved)
                    self.adamw.state[param][key] = empty
        for owner, module in self.modules.items():
            for name, value in module.state_dict().items():
                copy_whole(value, tensors[f"module/{owner}/{name}"])

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the modules carry the EMA weights; afterwards all their tensors are as before."""
        before = snapshot_modules(self.modules)
        for shard, ema in zip(own_shards(self.params), self.ema):
            shard.copy_(ema)
        try:
            yield
        finally:
            restore_modules(self.modules, before)


def like(param: Tensor, local: Tensor) -> Tensor:
    """`local`, this rank's part of something shaped and sharded like `param`, as such a tensor; it shares the memory."""
    from torch.distributed.tensor import DTensor

    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, shape=param.shape, stride=param.stride(), run_check=False
    )
