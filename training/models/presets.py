"""Model presets: one frozen description of a DiT, a VAE, a text encoder and how they are sampled."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longtake.checked_yaml import read_yaml
from longtake.errors import LongtakeError, nearest
from longtake.paths import REPOSITORY
from longtake.record import record_from_mapping
from longtake.training.models.preset_parts import SEE as SEE
from longtake.training.models.preset_parts import TEXT_KINDS as TEXT_KINDS
from longtake.training.models.preset_parts import DiTConfig as DiTConfig
from longtake.training.models.preset_parts import SamplingConfig as SamplingConfig
from longtake.training.models.preset_parts import TextEncoderConfig as TextEncoderConfig
from longtake.training.models.preset_parts import VAEConfig as VAEConfig
from longtake.training.models.preset_parts import at_least
from longtake.training.models.sana_wm.config import ListedSampling, LTX2Config, SanaWMConfig

SHIPPED = REPOSITORY / "training" / "presets"


LEAST_WINDOW = 3  # chunks: two sinks and the one that is generated


@dataclass(frozen=True)
class Preset:
    """A model family member. Latents are [B, F, C, H, W] outside the DiT.

    family: see families.py. chunk_latents: latent frames of a chunk; first_chunk_latents: of chunk 0, as many if 0.
    window_chunks: chunks that one sees, itself among them; as many slots a cache has.
    checkpoints: folder of its own ones; where they lie makes no other preset of it.
    """

    name: str
    family: str
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
    checkpoints: str = field(default="", compare=False)
    first_chunk_latents: int = 0

    def __post_init__(self) -> None:
        """Raise LongtakeError for a window without room for both sinks and the chunk itself, and for parts that don't fit."""
        if self.window_chunks < LEAST_WINDOW:
            what, small = f"preset {self.name}: the window is too small", f"{self.window_chunks} chunks"
            expected, fix = (
                f"{LEAST_WINDOW} or more: two sinks and the chunk itself",
                f"set window_chunks: {LEAST_WINDOW}",
            )
            raise LongtakeError(what, got=small, expected=expected, fix=fix)
        at_least(self, 1, "height", "width", "fps", "chunk_latents")
        at_least(self, 0, "shot_rope_offset", "first_chunk_latents")
        down, across = (self.vae.stride[i] * self.dit.patch[i] for i in (1, 2))
        for got, wanted, what in (
            ({"height": self.height % down, "width": self.width % across}, {"height": 0, "width": 0},
             f"the size is no multiple of a token's {down}x{across} pixels"),
            ({"vae z_channels": self.vae.z_channels}, {"vae z_channels": self.dit.channels}, "the VAE does not fit the DiT"),
            ({"text dim": self.text.dim, "text length": self.text.length},
             {"text dim": self.dit.text_dim, "text length": self.dit.text_len}, "the text encoder does not fit the DiT"),
        ):  # fmt: skip
            if got != wanted:
                raise LongtakeError(f"preset {self.name}: {what}", got=got, expected=wanted, fix=SEE)

    @property
    def digests(self) -> dict[str, str]:
        """Of what each network is, by kind of checkpoint, where the preset is not a shipped one: its name alone tells little."""
        if self.name in PRESETS:
            return {}
        return {kind: self.digest_of(kind) for kind in ("dit", "vae", "text_encoder")}

    def digest_of(self, kind: str) -> str:
        """Of what one network is, by its kind of checkpoint."""
        part = {"dit": self.dit, "vae": self.vae, "text_encoder": self.text}[kind]
        return hashlib.sha256(f"{self.family} {part}".encode()).hexdigest()

    @property
    def label(self) -> str:
        """The name; of a preset that is not shipped also who it is, so that another of this name is another."""
        digest = hashlib.sha256(repr(replace(self, checkpoints="")).encode()).hexdigest()[:12]
        return self.name if self.name in PRESETS else f"{self.name} ({digest})"

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


@dataclass(frozen=True)
class WorldPreset(Preset):
    """A preset of the family sana_wm, whose DiT and VAE are described otherwise."""

    dit: SanaWMConfig
    vae: LTX2Config  # type: ignore[assignment]
    sampling: ListedSampling
    fps: int = 16
    chunk_latents: int = 3
    window_chunks: int = 3
    first_chunk_latents: int = 4

    def __post_init__(self) -> None:
        """Raise LongtakeError for what `Preset` refuses, and for chunks that the short convolutions cannot be cut into."""
        super().__post_init__()
        if self.chunk_latents < 3 or self.first_chunk_latents < self.chunk_latents:
            got = f"{self.first_chunk_latents} latents, then {self.chunk_latents}"
            raise LongtakeError(f"preset {self.name}: the chunks are too short", got=got, expected="4, then 3", fix=SEE)
        if self.window_chunks % 2 == 0:
            raise LongtakeError(
                f"preset {self.name}: bad window", got=self.window_chunks, expected="an odd number", fix=SEE
            )
        if self.dit.plucker_channels != 6 * self.vae.stride[0]:
            raise LongtakeError(
                f"preset {self.name}: the camera maps do not fit the VAE",
                got=f"plucker_channels {self.dit.plucker_channels}",
                expected=6 * self.vae.stride[0],
                fix=SEE,
            )


PRESET_TYPES: dict[str, type[Preset]] = {"sana_wm": WorldPreset}  # of families whose parts are described otherwise


def is_file(path: Path) -> bool:
    """`Path.is_file`, also for what no path can be: too long, or with a zero byte."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_preset(path: Path, folder: Path) -> Preset:
    """The preset in a file. `folder`: what the path of its checkpoints starts from, by default checkpoints/NAME there."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.stem):
        what = f"a preset cannot be called {path.stem!r}"
        raise LongtakeError(what, expected="letters, digits, dots and dashes", fix="give the file another name")
    values = _values(path)
    family = values.get("family") if isinstance(values, dict) else None
    kind = PRESET_TYPES.get(family, Preset) if isinstance(family, str) else Preset
    preset: Preset = record_from_mapping(kind, values, f"preset {path}", SEE, name=path.stem)
    place = preset.checkpoints or f"checkpoints/{preset.name}"
    return replace(preset, checkpoints=place if folder == REPOSITORY else str(folder / place))


def _values(path: Path, above: tuple[Path, ...] = ()) -> Any:
    """What a preset file says, over what its `base` says: a shipped preset by name, or a file beside it."""
    values = read_yaml(path, "preset", "key: value lines in UTF-8", SEE)
    if not isinstance(values, dict) or "base" not in values:
        return values
    base, own = str(values["base"]), {key: value for key, value in values.items() if key != "base"}
    beside = path.parent / base if base.endswith((".yaml", ".yml")) else SHIPPED / f"{base}.yaml"
    if not is_file(beside) or beside.resolve() in (path.resolve(), *above):
        names = sorted(PRESETS)
        expected, fix = " | ".join([*names, "another file beside it"]), nearest(base, names, SEE)
        raise LongtakeError(f"preset {path}: bad base", got=base, expected=expected, fix=fix)
    under = _values(beside, (*above, path.resolve()))
    if not isinstance(under, dict):
        return under
    both = [key for key, value in own.items() if isinstance(value, dict) and isinstance(under.get(key), dict)]
    return {**under, "checkpoints": "", **own, **{key: {**under[key], **own[key]} for key in both}}


PRESETS: dict[str, Preset] = {}
PRESETS |= {path.stem: read_preset(path, REPOSITORY) for path in sorted(SHIPPED.glob("*.yaml"))}
TINY, WAN22_TI2V_5B = PRESETS["tiny"], PRESETS["wan2.2-ti2v-5b"]
