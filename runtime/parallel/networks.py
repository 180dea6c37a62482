"""What a rank runs: the transformer on its tokens and heads, the VAE decoder on its rows. Same weights, not copied.

Legend: T tokens of a chunk, H heads, D head_dim, P ranks; B, C channels, F frames, rows, columns.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.plugins.kv_cache_write.reference import quantize_kv
from longtake.runtime.parallel.comm import Comm
from longtake.training.models.wan.networks import DiTStep
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.vae_layers import FrameAttention

ROWS = 3  # axis of rows in [B, C, F, rows, columns]


class SplitDiTStep(DiTStep):
    """A pass over a rank's frames of a chunk; the cache tensors are those of its heads, and are written in place.

    Attention couples tokens and never heads: an all-to-all before it turns "my tokens, all heads" into "all tokens, my
    heads", and one behind it turns that back. So the window that lies in the cache never travels.
    """

    def __init__(self, step: DiTStep, comm: Comm) -> None:
        super().__init__(step.dit, step.cache)
        self.comm = comm

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: list[Tensor], table: Tensor, write_slot: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """See DiTStep.attention; q, k, v [T / P, H, D]. `write_slot` is on the host."""
        q, k, v = self.comm.gather_tokens(torch.stack((q, k, v))).unbind(0)
        if (slot := int(write_slot)) >= 0:  # the clean pass only: the others exchange no amax
            for kept, new in zip(cache, self._stored(torch.stack((k, v))), strict=True):
                kept[slot].copy_(new)
        out = self.read(q, k, v, *cache, table)
        return self.comm.gather_heads(out[None])[0], cache

    def _stored(self, kv_2LHD: Tensor) -> tuple[Tensor, ...]:
        """K and V as the cache holds them. The amax is that of all ranks' heads: so the codes are those of one GPU."""
        if self.cache == "bf16":
            return (kv_2LHD,)
        return quantize_kv(kv_2LHD.float(), self.comm.largest)


def vae_of_rows(vae: CausalVAE, comm: Comm, parts: list[int]) -> CausalVAE:
    """`vae` with a decoder that takes and gives a rank's rows. parts: latent rows of each rank.

    Norms, shortcuts, upsampling and convolutions over time look at no other row. The 3x3 ones look at one on each side,
    which the neighbours send; the attention of the lowest resolution gathers keys and values of the frame.
    """
    tensors = (*vae.parameters(), *vae.buffers())
    split = copy.deepcopy(vae, {id(tensor): tensor for tensor in tensors})
    for module in split.decoder.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[1] == 3:
            module._conv_forward = partial(_with_rows_around, module, comm)  # type: ignore[method-assign]
        elif isinstance(module, FrameAttention):
            module.everywhere = partial(comm.joined, axis=1, parts=parts)  # type: ignore[method-assign]
    return split


def _with_rows_around(conv: nn.Conv3d, comm: Comm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    above, below = comm.rows_around(x, ROWS)
    padding = (int(conv.padding[0]), 0, int(conv.padding[2]))
    return functional.conv3d(torch.cat([above, x, below], ROWS), weight, bias, conv.stride, padding)
