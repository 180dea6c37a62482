"""The parts of a preset: one frozen description of a DiT, a VAE, a text encoder, and of how they are sampled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longtake.errors import LongtakeError
from longtake.record import record_from_json

SEE = "see training/presets and docs/add-a-recipe.md"
TEXT_KINDS = ("words", "umt5", "pretrained", "gemma2")


def at_least(owner: Any, least: int, *names: str) -> None:
    """Raise LongtakeError for the first of some fields with a number below `least`."""
    for name in names:
        value = getattr(owner, name)
        if any(each < least for each in (value if isinstance(value, tuple) else (value,))):
            raise LongtakeError(f"bad {name}", got=value, expected=f"{least} or more", fix=SEE)


@dataclass(frozen=True)
class DiTConfig:
    """Causal video DiT. `head_dim` is dim / heads and must be a multiple of 16 (one NVFP4 block)."""

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    channels: int
    text_dim: int
    text_len: int
    freq_dim: int = 256
    eps: float = 1e-6
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        at_least(self, 1, *(name for name in vars(self) if name not in ("eps", "rope_theta")))
        if self.dim % self.heads or (self.dim // self.heads) % 16:
            what, got = "heads do not fit the DiT", f"dim {self.dim}, heads {self.heads}"
            expected, fix = "dim / heads a multiple of 16", "change dim or heads in the preset"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class VAEConfig:
    """Causal video VAE of the Wan 2.2 kind: pixel unshuffle 2, then `len(dim_mult) - 1` spatial halvings.

    quant_convs: 1x1x1 convolutions after the encoder and before the decoder. last_shortcut: the encoder's last level,
    which doesn't resample, has its shortcut too. The released Wan 2.2 VAE has both.
    """

    z_channels: int
    encoder_dim: int
    decoder_dim: int
    dim_mult: tuple[int, ...]
    res_blocks: int
    temporal_down: tuple[bool, ...]
    stride: tuple[int, int, int] = (4, 16, 16)
    quant_convs: bool = True
    last_shortcut: bool = True

    def __post_init__(self) -> None:
        """Raise LongtakeError for sizes below 1, and for a stride that the levels do not make."""
        at_least(self, 1, "z_channels", "encoder_dim", "decoder_dim", "dim_mult", "res_blocks", "stride")
        space, time = 2 ** len(self.dim_mult), 2 ** sum(self.temporal_down)
        if len(self.temporal_down) != len(self.dim_mult) - 1 or self.stride != (time, space, space):
            raise LongtakeError(
                "the levels do not fit the VAE",
                got=f"{len(self.dim_mult)} in dim_mult, {len(self.temporal_down)} in temporal_down, stride {self.stride}",
                expected=f"a temporal_down for each level but the last, stride ({time}, {space}, {space})",
                fix="change stride, or the levels",
            )


@dataclass(frozen=True)
class TextEncoderConfig:
    """Text encoder: `kind` picks the implementation (one of TEXT_KINDS), the rest its size. Output is [length, dim].

    ffn_dim and vocabulary are read by "umt5" and "gemma2" only; of a "pretrained" one dim and length, the rest says its folder.
    """

    kind: str
    dim: int
    layers: int
    heads: int
    length: int
    ffn_dim: int = 0
    vocabulary: int = 0

    def __post_init__(self) -> None:
        """Raise LongtakeError for an unknown kind, sizes below 1, and heads that do not divide the width."""
        if self.kind not in TEXT_KINDS:
            raise LongtakeError("bad kind", got=self.kind, expected=" | ".join(TEXT_KINDS), fix=SEE)
        at_least(
            self,
            1,
            "dim",
            "layers",
            "heads",
            "length",
            *(("ffn_dim", "vocabulary") * (self.kind in ("umt5", "gemma2"))),
        )
        if self.dim % self.heads:
            what = "heads do not fit the text encoder"
            got, expected = f"dim {self.dim}, heads {self.heads}", "dim a multiple of heads"
            raise LongtakeError(what, got=got, expected=expected, fix="change dim or heads in the preset")


@dataclass(frozen=True)
class SamplingConfig:
    """What the preset's checkpoints are sampled with unless a story says otherwise."""

    steps: int
    guidance: float
    shift: float = 5.0

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")

    @property
    def listed(self) -> tuple[float, ...]:
        """The timesteps of a preset that lists them, as many as steps; none where they follow from steps and shift."""
        return ()

    def in_steps(self, steps: int) -> SamplingConfig:
        """The same in so many steps."""
        return replace(self, steps=steps)

    @classmethod
    def told(cls, record: dict[str, Any] | None) -> SamplingConfig | None:
        """What a checkpoint or an export tells of how it is sampled; TypeError for what tells nothing of it."""
        return None if record is None else record_from_json(cls, record)
