"""AdamW and EMA of sharded weights: state stays sharded, and is gathered tensor by tensor for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from longtake.training.optimizer import Averaged, OptimizerConfig
from longtake.training.parallel.ranks import Ranks
from longtake.training.parallel.sharding import copy_whole, own_shards, whole


class ShardedAveraged(Averaged):
    """`optimizer.Averaged` for FSDP2's parameters. `state` and `load_state` speak of whole tensors, as one rank does."""

    def __init__(self, modules: dict[str, nn.Module], config: OptimizerConfig, ranks: Ranks) -> None:
        super().__init__(modules, config)
        self.ranks = ranks
        self.ema = [shard.float().clone() for shard in own_shards(self.params)]

    def clip(self) -> Tensor:
        """As `Averaged.clip`; the norm is that of the whole gradient, the same on all ranks."""
        return whole(super().clip())

    def own(self) -> list[Tensor]:
        """This rank's shards."""
        return own_shards(self.params)

    def averages(self) -> Iterable[Tensor]:
        """The EMA of each parameter, sharded like it."""
        return map(like, self.params, self.ema)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, whole, on the first rank; nothing on the others. All must call."""
        found: dict[str, Tensor] = {}
        for name, value in self.named():
            gathered = whole(value.detach())
            if self.ranks.first:
                found[name] = gathered.cpu().clone()
        return found

    def copy(self, value: Tensor, saved: Tensor) -> None:
        """Every rank reads the whole tensor and keeps its shard."""
        copy_whole(value, saved)


def like(param: Tensor, local: Tensor) -> Tensor:
    """`local`, this rank's part of something shaped and sharded like `param`, as such a tensor; it shares the memory."""
    from torch.distributed.tensor import DTensor

    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, shape=param.shape, stride=param.stride(), run_check=False
    )
