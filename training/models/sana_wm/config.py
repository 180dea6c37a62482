"""What a preset of this family says of its DiT, its VAE and its sampling.

A *dialect* is one of the public readings of the same weights: see docs/compatibility.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from longtake.errors import LongtakeError
from longtake.training.models.preset_parts import SEE, DiTConfig, SamplingConfig, at_least

CONV_TAIL = 3  # frames of raw K that the short convolution keeps
RAY_CLIPS = ("none", "softmax", "all")
DOWN = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}


@dataclass(frozen=True)
class Dialect:
    """softmax_scale: attention scores are divided by the square roots of these, in the main and in the camera branch; 0
    stands for the head size. camera_conv_tail: whether the camera's short convolution sees the chunk before. ray_clip:
    blocks in which a ray transform may shorten a vector but not lengthen it.
    """

    softmax_scale: tuple[int, ...] = (0, 0)
    camera_conv_tail: bool = True
    ray_clip: str = "none"

    def __post_init__(self) -> None:
        if len(self.softmax_scale) != 2 or min(self.softmax_scale) < 0:
            got = self.softmax_scale
            raise LongtakeError("bad softmax_scale", got=got, expected="two numbers, main and camera", fix="[0, 0]")
        if self.ray_clip not in RAY_CLIPS:
            raise LongtakeError("bad ray_clip", got=self.ray_clip, expected=" | ".join(RAY_CLIPS), fix="ray_clip: none")


CURRENT = Dialect()


@dataclass(frozen=True)
class SanaWMConfig(DiTConfig):
    """`softmax_every`: every so many blocks one is softmax attention, the others are gated delta networks; 0: none is."""

    softmax_every: int = field(kw_only=True)
    plucker_channels: int = 48
    patch: tuple[int, int, int] = (1, 1, 1)
    norm_eps: float = 1e-5  # of q, k and text; cross-attention and LayerNorm have `eps`
    dialect: Dialect = CURRENT

    def __post_init__(self) -> None:
        """Raise LongtakeError for heads that the camera's 4x4 transforms cannot be cut into."""
        at_least(self, 1, "dim", "ffn_dim", "layers", "heads", "channels", "text_dim", "text_len", "freq_dim")
        at_least(self, 0, "softmax_every")
        if self.dim % self.heads or self.head_dim % 8:
            raise LongtakeError(
                "heads do not fit the DiT",
                got=f"dim {self.dim}, heads {self.heads}",
                expected="dim / heads a multiple of 8: half of a head is groups of 4",
                fix="change dim or heads in the preset",
            )
        if self.patch != (1, 1, 1):
            raise LongtakeError("bad patch", got=self.patch, expected=(1, 1, 1), fix="leave patch out")

    def softmax(self, layer: int) -> bool:
        """Whether block `layer` is softmax attention."""
        return self.softmax_every > 0 and (layer + 1) % self.softmax_every == 0

    @property
    def conv_tails(self) -> int:
        """How many short convolutions of a block see the chunk before."""
        return 1 + self.dialect.camera_conv_tail

    def score_scale(self, camera: bool) -> float:
        """What softmax attention's scores are multiplied by."""
        return float((self.dialect.softmax_scale[camera] or self.head_dim) ** -0.5)

    def clips(self, layer: int) -> bool:
        """Whether block `layer` keeps ray transforms from lengthening vectors."""
        return self.dialect.ray_clip == "all" or (self.dialect.ray_clip == "softmax" and self.softmax(layer))


@dataclass(frozen=True)
class LTX2Config:
    """Causal video VAE of LTX-2: patches of `patch` pixels, then a resampling a level.

    encoder_widths, down: of each level. encoder_layers: residual blocks of each level, and of the middle. The decoder's
    are listed in the order of the encoder's, as the publisher's configuration does: it runs them from the last on.
    factor: what an upsampling divides the width by.
    """

    z_channels: int
    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    down: tuple[str, ...]
    up: tuple[str, ...]
    factor: int = 2
    patch: int = 4
    stride: tuple[int, int, int] = (8, 32, 32)

    def __post_init__(self) -> None:
        """Raise LongtakeError for levels that do not fit each other, or make another stride."""
        at_least(self, 1, "z_channels", "encoder_widths", "decoder_widths", "encoder_layers", "decoder_layers", "patch")
        known = [kind in DOWN for kind in (*self.down, *self.up)]
        counts = (
            (len(self.encoder_widths), len(self.encoder_layers) - 1),
            (len(self.decoder_widths), len(self.decoder_layers) - 1),
        )
        if not all(known) or counts != ((len(self.down),) * 2, (len(self.up),) * 2):
            raise LongtakeError(
                "the levels do not fit the VAE",
                got=f"down {self.down}, up {self.up}, {counts[0]} and {counts[1]} widths and layers",
                expected=f"a width and layers for each level, each one of {', '.join(DOWN)}",
                fix=SEE,
            )
        before = (self.z_channels, *self.encoder_widths)
        folds = [
            *zip(before, self.encoder_widths, self.down),
            *((w, w, kind) for w, kind in zip(self.decoder_widths[::-1], self.up)),
        ]
        for width, after, kind in folds:
            if after % math.prod(DOWN[kind]) or width * math.prod(DOWN[kind]) % after or after % self.factor:
                expected = (
                    f"multiples of {math.prod(DOWN[kind])} that divide {math.prod(DOWN[kind])} times the width before"
                )
                raise LongtakeError(
                    f"{kind} resampling does not fit the widths", got=f"{width}, {after}", expected=expected, fix=SEE
                )
        for kinds in (self.down, self.up):
            made = [1, self.patch, self.patch]
            for kind in kinds:
                made = [size * by for size, by in zip(made, DOWN[kind])]
            if tuple(made) != self.stride:
                raise LongtakeError("the levels do not make the stride", got=tuple(made), expected=self.stride, fix=SEE)


@dataclass(frozen=True)
class ListedSampling(SamplingConfig):
    """timesteps: of a chunk's denoise passes, taken as they are."""

    timesteps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps and len(self.timesteps) != self.steps:
            got = f"{self.steps} steps, {len(self.timesteps)} timesteps"
            raise LongtakeError("steps and timesteps differ", got=got, expected="as many", fix="leave timesteps out")

    @property
    def listed(self) -> tuple[float, ...]:
        return self.timesteps

    def in_steps(self, steps: int) -> ListedSampling:
        """The listed timesteps if they are as many, else even ones."""
        return replace(self, steps=steps, timesteps=self.timesteps if steps == self.steps else ())
