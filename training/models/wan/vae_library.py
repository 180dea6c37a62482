"""A later step of the VAE decoder with every layer but a few an op of ours: channels last from end to end.

The same weights and the same frames as `vae.DecoderSteady`, which stays the truth. An engine keeps what lies before the
first convolution, attention in the middle, and the head: the last convolution and what follows it.

Legend: T frames at a layer's own rate, H, W sizes, C channels. Tensors are [T,H,W,C] unless they say otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.models.wan.vae import CausalVAE, shuffle
from longtake.training.models.wan.vae_layers import (
    CausalConv3d,
    Level,
    Middle,
    ResBlock,
    RMSNorm,
    Up,
    channels_first,
    channels_last,
)


class LibrarySteady(nn.Module):
    """(latent fp32 [1,z,F,h,w], *caches) -> (frames fp32 [1,3,4F,H,W], *new caches), like `vae.DecoderSteady` with ops.

    With `in_place` the new caches are the old ones, overwritten.
    """

    def __init__(self, vae: CausalVAE, in_place: bool = False) -> None:
        import longtake.plugins.ops  # noqa: F401  (registers torch.ops.longtake)

        super().__init__()
        self.vae, self.in_place = vae, in_place

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        vae, walk = self.vae, _Walk(caches, self.in_place)
        mean, std = (buffer.float().view(-1, 1, 1, 1) for buffer in (vae.latent_mean, vae.latent_std))
        raw = (latent.float() * std + mean).to(vae.decoder.conv_in.conv.weight.dtype)
        x = walk.conv(channels_last(vae.post_quant(raw)).contiguous(), vae.decoder.conv_in)
        for stage in vae.decoder.stages:
            x = walk.middle(x, stage) if isinstance(stage, Middle) else walk.level(x, stage)
        longer = walk.extend(x, vae.decoder.norm)
        patches = vae.decoder.conv_out.conv(channels_first(longer))
        return shuffle(patches).float().clamp(-1.0, 1.0), *walk.new


class _Walk:
    """The layers over ops, caches consumed and produced in the order in which they run."""

    def __init__(self, caches: Sequence[Tensor], in_place: bool) -> None:
        self._old, self.in_place = iter(caches), in_place
        self.new: list[Tensor] = []
        self.ops: Any = torch.ops.longtake

    def extend(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """The history before x [T,H,W,C], which goes through `norm` and SiLU first if there is one."""
        old = next(self._old)
        gamma = () if norm is None else (norm.gamma.to(x.dtype),)
        longer, new = (self.ops.norm_silu_extend if gamma else self.ops.stream_extend)(x, *gamma, old)
        self.new.append(old.copy_(new) if self.in_place else new)
        return longer

    def conv(
        self, x: Tensor, layer: CausalConv3d, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """A causal convolution that sees the past."""
        name = "conv_" + "x".join(map(str, layer.conv.kernel_size)) + ("" if residual is None else "_add")
        given = () if residual is None else (residual,)
        return getattr(self.ops, name)(self.extend(x, norm), layer.conv.weight, layer.conv.bias, *given)

    def block(self, x: Tensor, block: ResBlock) -> Tensor:
        y = self.conv(x, block.conv1, block.norm1)
        short = block.shortcut
        residual = self.ops.conv_1x1x1(x, short.weight, short.bias) if isinstance(short, nn.Conv3d) else x
        return self.conv(y, block.conv2, block.norm2, residual)

    def middle(self, x: Tensor, stage: Middle) -> Tensor:
        x = self.block(x, stage.before)
        return self.block(channels_last(stage.attention(channels_first(x))).contiguous(), stage.after)

    def level(self, x: Tensor, level: nn.Module) -> Tensor:
        assert isinstance(level, Level)
        y = x
        for block in level.blocks:
            assert isinstance(block, ResBlock)
            y = self.block(y, block)
        return y if level.resample is None else self.up(x, y, level.resample)

    def up(self, x: Tensor, y: Tensor, up: nn.Module) -> Tensor:
        """y upsampled and convolved, plus the level's input x with its channels unfolded."""
        assert isinstance(up, Up)
        wide = self.ops.upsample_space(y) if up.time is None else self.ops.upsample_time(self.conv(y, up.time))
        main = self.ops.conv_1x3x3(wide, up.space.weight, up.space.bias)
        return (self.ops.duplicate_up if up.time is None else self.ops.duplicate_up_time)(x, main)


def library_ops(vae: CausalVAE) -> Counter[str]:
    """How many nodes of each op a step of `LibrarySteady` holds."""
    modules = list(vae.decoder.modules())
    blocks = [module for module in modules if isinstance(module, ResBlock)]
    ups = [module for module in modules if isinstance(module, Up)]
    timed = sum(up.time is not None for up in ups)
    past = sum(isinstance(module, CausalConv3d) and module.past > 0 for module in modules)
    normed = 2 * len(blocks) + 1  # two in a block, one before the last convolution
    ops = {
        "norm_silu_extend": normed, "stream_extend": past - normed,
        "conv_3x3x3": len(blocks) + 1, "conv_3x3x3_add": len(blocks), "conv_3x1x1": timed, "conv_1x3x3": len(ups),
        "conv_1x1x1": sum(isinstance(block.shortcut, nn.Conv3d) for block in blocks),
        "upsample_time": timed, "duplicate_up_time": timed,
        "upsample_space": len(ups) - timed, "duplicate_up": len(ups) - timed,
    }  # fmt: skip
    return +Counter(ops)
