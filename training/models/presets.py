"""Model presets: one frozen description of a DiT, a VAE, a text encoder and how they are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from longtake.errors import LongtakeError
from longtake.record import record_from_json


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
        if self.dim % self.heads or (self.dim // self.heads) % 16:
            raise LongtakeError(
                "heads do not fit the DiT",
                got=f"dim {self.dim}, heads {self.heads}",
                expected="dim / heads a multiple of 16",
                fix="change dim or heads in the preset",
            )

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


@dataclass(frozen=True)
class TextEncoderConfig:
    """Text encoder: `kind` picks the implementation ("words" or "umt5"), the rest its size. Output is [length, dim].

    ffn_dim and vocabulary are read by "umt5" only.
    """

    kind: str
    dim: int
    layers: int
    heads: int
    length: int
    ffn_dim: int = 0
    vocabulary: int = 0


@dataclass(frozen=True)
class SamplingConfig:
    """What the preset's checkpoints are sampled with unless a story says otherwise."""

    steps: int
    guidance: float
    shift: float = 5.0

    @classmethod
    def told(cls, record: dict[str, Any] | None) -> SamplingConfig | None:
        """What a checkpoint or an export tells of how it is sampled; TypeError for what tells nothing of it."""
        return None if record is None else record_from_json(cls, record)


LEAST_WINDOW = 3  # chunks: two sinks and the one that is generated


@dataclass(frozen=True)
class Preset:
    """A model family member. Latents are [B, F, C, H, W] outside the DiT.

    family: see families.py. chunk_latents: latent frames of a chunk; first_chunk_latents: of chunk 0, as many if 0.
    window_chunks: chunks that one sees, itself among them; as many slots a cache has.
    """

    name: str
    dit: DiTConfig
    vae: VAEConfig
    text: TextEncoderConfig
    sampling: SamplingConfig
    height: int
    width: int
    fps: int = 24
    chunk_latents: int = 8
    window_chunks: int = 4
    shot_rope_offset: int = 8
    negative_prompt: str = ""
    checkpoints: str = field(default="")
    family: str = "wan"
    first_chunk_latents: int = 0

    def __post_init__(self) -> None:
        """Raise LongtakeError for a window without room for both sinks and the chunk itself."""
        if self.window_chunks < LEAST_WINDOW:
            raise LongtakeError(f"preset {self.name}: the window is too small", got=f"{self.window_chunks} chunks",
                                expected=f"{LEAST_WINDOW} or more: two sinks and the chunk itself",
                                fix=f"set window_chunks: {LEAST_WINDOW}")  # fmt: skip

    def frames_of(self, chunk: int) -> int:
        """Latent frames of chunk `chunk`."""
        return self.first_chunk_latents or self.chunk_latents if chunk == 0 else self.chunk_latents

    def first_frame(self, chunk: int) -> int:
        """Index of the first latent frame of chunk `chunk`: the frames of all before it."""
        return self.frames_of(0) + (chunk - 1) * self.chunk_latents if chunk else 0

    def whole_chunks(self, frames: int) -> int:
        """How many chunks a video of `frames` latent frames holds; what is left over is part of the next one."""
        rest = frames - self.frames_of(0)
        return 0 if rest < 0 else 1 + rest // self.chunk_latents

    @property
    def latent_hw(self) -> tuple[int, int]:
        """Height and width of a latent frame."""
        return self.height // self.vae.stride[1], self.width // self.vae.stride[2]

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Height and width of a latent frame in tokens."""
        height, width = self.latent_hw
        return height // self.dit.patch[1], width // self.dit.patch[2]

    @property
    def frame_tokens(self) -> int:
        return self.grid_hw[0] * self.grid_hw[1]

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one chunk (one cache slot)."""
        return self.frame_tokens * self.chunk_latents


TINY = Preset(
    name="tiny",
    dit=DiTConfig(dim=256, ffn_dim=768, layers=6, heads=4, channels=16, text_dim=128, text_len=32),
    vae=VAEConfig(
        z_channels=16,
        encoder_dim=12,
        decoder_dim=16,
        dim_mult=(1, 2, 2, 4),
        res_blocks=1,
        temporal_down=(False, True, True),
        quant_convs=False,
        last_shortcut=False,
    ),
    text=TextEncoderConfig(kind="words", dim=128, layers=2, heads=4, length=32),
    sampling=SamplingConfig(steps=16, guidance=3.0),
    height=128,
    width=128,
    checkpoints="training/checkpoints/tiny",
)

WAN22_TI2V_5B = Preset(
    name="wan2.2-ti2v-5b",
    dit=DiTConfig(dim=3072, ffn_dim=14336, layers=30, heads=24, channels=48, text_dim=4096, text_len=512),
    vae=VAEConfig(
        z_channels=48,
        encoder_dim=160,
        decoder_dim=256,
        dim_mult=(1, 2, 4, 4),
        res_blocks=2,
        temporal_down=(False, True, True),
    ),
    text=TextEncoderConfig(kind="umt5", dim=4096, layers=24, heads=64, length=512, ffn_dim=10240, vocabulary=256384),
    sampling=SamplingConfig(steps=4, guidance=1.0),
    height=704,
    width=1280,
    checkpoints="checkpoints/wan2.2-ti2v-5b",
)

# The widths of the 5B transformer, so every Linear is a real one, at a depth and size that a CPU checks in minutes.
# Its other networks are narrow. Weights: longtake random-weights --preset wan2.2-ti2v-5b-check.
WAN22_TI2V_5B_CHECK = replace(
    WAN22_TI2V_5B,
    name="wan2.2-ti2v-5b-check",
    dit=replace(WAN22_TI2V_5B.dit, layers=2),
    vae=replace(WAN22_TI2V_5B.vae, encoder_dim=32, decoder_dim=32),
    text=replace(WAN22_TI2V_5B.text, layers=1, ffn_dim=256, vocabulary=512),
    height=128,
    width=128,
    checkpoints="checkpoints/wan2.2-ti2v-5b-check",
)

PRESETS = {preset.name: preset for preset in (TINY, WAN22_TI2V_5B, WAN22_TI2V_5B_CHECK)}


def preset_named(name: str) -> Preset:
    """Return the preset called `name`; an unknown name is an error that lists the known ones."""
    if name not in PRESETS:
        raise LongtakeError(
            "unknown preset", got=name, expected=", ".join(sorted(PRESETS)), fix="pass one of these with --preset"
        )
    return PRESETS[name]
