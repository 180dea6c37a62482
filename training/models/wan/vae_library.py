"""A later step of the VAE decoder with every layer but a few an op of ours: channels last from end to end.

The same weights and the same frames as `vae.DecoderSteady`, which stays the truth. An engine keeps what lies before the
first convolution, attention in the middle, and the head: the last convolution and what follows it.

Legend: T frames at a layer's own rate, H, W sizes, C channels. Tensors are [T,H,W,C] unless they say otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longtake.plugins.registry import coded_op
from longtake.plugins.stream_extend.op import op_name
from longtake.training.models.wan.vae import CausalVAE, DecoderFirst, shuffle
from longtake.training.models.wan.vae_codes import CodedConv, coded_caches
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

    With `in_place` the new caches are the old ones, overwritten. coded: convolutions that run in 8-bit codes, by name; the
    histories in front of them are codes as well.
    """

    def __init__(self, vae: CausalVAE, in_place: bool = False, coded: Mapping[str, CodedConv] | None = None) -> None:
        import longtake.plugins.ops  # noqa: F401  (registers torch.ops.longtake)

        super().__init__()
        self.vae, self.in_place = vae, in_place
        self.coded = nn.ModuleDict({name.replace(".", "/"): conv for name, conv in (coded or {}).items()})

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        coded = {id(self.vae.get_submodule(name.replace("/", "."))): conv for name, conv in self.coded.items()}
        vae, walk = self.vae, self.walk(caches, coded)
        mean, std = (buffer.float().view(-1, 1, 1, 1) for buffer in (vae.latent_mean, vae.latent_std))
        raw = (latent.float() * std + mean).to(vae.decoder.conv_in.conv.weight.dtype)
        x = walk.conv(channels_last(vae.post_quant(raw)).contiguous(), vae.decoder.conv_in)
        for stage in vae.decoder.stages:
            x = walk.middle(x, stage) if isinstance(stage, Middle) else walk.level(x, stage)
        longer = walk.rows(walk.extend(x, vae.decoder.norm))
        patches = vae.decoder.conv_out.conv(channels_first(longer))
        return shuffle(patches).float().clamp(-1.0, 1.0), *walk.new

    def walk(self, caches: Sequence[Tensor], coded: Mapping[int, Any]) -> Walk:
        """What goes through the layers."""
        return Walk(caches, self.in_place, coded)


class Walk:
    """The layers over ops, caches consumed and produced in the order in which they run."""

    def __init__(self, caches: Sequence[Tensor], in_place: bool, coded: Mapping[int, Any]) -> None:
        self._old, self.in_place, self._coded = iter(caches), in_place, coded
        self.new: list[Tensor] = []
        self.ops: Any = torch.ops.longtake

    def extend(self, x: Tensor, norm: RMSNorm | None = None, coded: CodedConv | None = None) -> Tensor:
        """The history before x [T,H,W,C], which goes through `norm` and SiLU first if there is one; codes for `coded`."""
        old = next(self._old)
        gamma = () if norm is None else (norm.gamma.to(x.dtype),)
        factor = () if coded is None else (coded.factor,)
        op = getattr(self.ops, op_name(norm is not None, "" if coded is None else coded.codes))
        longer, new = op(x, *gamma, *factor, old)
        self.new.append(old.copy_(new) if self.in_place else new)
        return longer

    def conv(
        self, x: Tensor, layer: CausalConv3d, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """A causal convolution that sees the past."""
        longer = self.extend(x, norm, self._coded.get(id(layer.conv)))
        return self.run(self.rows(longer) if layer.conv.kernel_size[1] > 1 else longer, layer.conv, residual)

    def rows(self, x: Tensor) -> Tensor:
        """x as a convolution over rows wants it; a rank has rows of others to ask for."""
        return x

    def run(self, x: Tensor, layer: nn.Conv3d, residual: Tensor | None = None) -> Tensor:
        """A convolution of frames that are there already, as codes if it runs in them."""
        coded = self._coded.get(id(layer))
        name = "conv_" + "x".join(map(str, layer.kernel_size)) + ("" if residual is None else "_add")
        given = () if residual is None else (residual,)
        if coded is None:
            return getattr(self.ops, name)(x, layer.weight, layer.bias, *given)
        return getattr(self.ops, coded_op(name, coded.codes))(x, coded.weight, coded.scale, layer.bias, *given)

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
        coded, name = self._coded.get(id(up.space)), _upsampling(up)
        name, factor = (name, ()) if coded is None else (coded_op(name, coded.codes), (coded.factor,))
        if up.time is not None:
            y = self.conv(y, up.time)
        main = self.run(getattr(self.ops, name)(self.rows(y), *factor), up.space)
        return (self.ops.duplicate_up if up.time is None else self.ops.duplicate_up_time)(x, main)


class LibraryFirst(DecoderFirst):
    """`vae.DecoderFirst` whose caches are as `LibrarySteady` wants them: [T,H,W,C], and codes for what runs in codes."""

    def __init__(self, vae: CausalVAE, coded: Mapping[str, CodedConv]) -> None:
        import longtake.plugins.ops  # noqa: F401  (registers torch.ops.longtake)

        super().__init__(vae, ops=True)
        self.coded = nn.ModuleDict({name.replace(".", "/"): conv for name, conv in coded.items()})

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        frames, *caches = super().forward(latent)
        for i, name in enumerate(coded_caches(self.vae.config)):
            if name and name.replace(".", "/") in self.coded:
                conv: Any = self.coded[name.replace(".", "/")]
                caches[i] = getattr(torch.ops.longtake, f"encode_{conv.codes}")(caches[i], conv.factor)
        return frames, *caches


def _upsampling(up: Up) -> str:
    return "upsample_space" if up.time is None else "upsample_time"


def coded_ops(vae: CausalVAE, chosen: Mapping[str, str]) -> Counter[str]:
    """`library_ops` where convolutions run in codes: by name, which."""
    ops = library_ops(vae)
    for name, codes in chosen.items():
        layer, owner = vae.get_submodule(name), vae.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, nn.Conv3d)
        conv = "conv_" + "x".join(map(str, layer.kernel_size)) + ("_add" if name.endswith("conv2.conv") else "")
        if isinstance(owner, Up):
            before = _upsampling(owner)
        else:
            before = op_name(norm=layer.kernel_size[1] > 1)  # a 3x1x1 one reads what no norm has changed
        for plain in (conv, before):
            ops[plain] -= 1
            ops[coded_op(plain, codes)] += 1
    return +ops


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
