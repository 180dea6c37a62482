"""FSDP2: weights, gradients and optimizer state sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from longtake.errors import LongtakeError
from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.parallel.ranks import Ranks


def require_heads(preset: Preset, sequence: int) -> None:
    """Raise LongtakeError unless the heads can be dealt out evenly."""
    if preset.dit.heads % sequence:
        raise LongtakeError(
            f"{preset.dit.heads} heads can't be dealt out evenly to {sequence} ranks",
            got=f"--sequence-parallel {sequence}",
            expected=f"a divisor of {preset.dit.heads}",
            fix=f"--sequence-parallel {max(n for n in range(1, sequence) if preset.dit.heads % n == 0)}",
        )


def shard_dit(dit: CausalDiT, ranks: Ranks, bf16: bool = False) -> None:
    """Shard a DiT block by block, in place. `bf16`: gather weights and compute in bf16, reduce gradients in fp32."""
    if ranks.mesh is None:
        return
    policy = precision(bf16)
    for block in dit.blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "context")
    fully_shard(dit, mesh=ranks.mesh, mp_policy=policy)
    register_fsdp_forward_method(dit, "context")


def shard(module: nn.Module, ranks: Ranks, bf16: bool = False) -> None:
    """Shard any module that is called through its forward, in one piece and in place."""
    if ranks.mesh is not None and any(True for _ in module.parameters()):
        fully_shard(module, mesh=ranks.mesh, mp_policy=precision(bf16))


def precision(bf16: bool) -> MixedPrecisionPolicy:
    # Inputs stay as they are: rotary tables and positions are fp32 by intent
    dtype = torch.bfloat16 if bf16 else None
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in one piece, on every rank (all must call); another one as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory."""
    return [x.to_local().detach() if isinstance(x, DTensor) else x.detach() for x in tensors]


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a tensor in one piece, the same on all ranks, into a sharded one or another."""
    if isinstance(target, DTensor):
        source = distribute_tensor(
            source.to(target.device, target.dtype), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(source)
