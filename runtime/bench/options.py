"""What to measure, as one value that travels to the processes that measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe, recipe_named
from longtake.training.models.presets import Preset

NETWORKS = ("dit", "vae")
AGAINST = ("torch",)
# Parts in the order they run, each in a process of its own: its memory is its own, and its failure or delay as well.
PARTS = ("engine", "torch", "torch_vae", "torch_compile", "torch_autotune")
TORCH_PARTS = PARTS[1:]


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark.

    steps: denoise steps a chunk, besides the clean pass. warmup: chunks before measuring, at least until the window is
    full. chunks: chunks measured in each mode. networks: of "dit", "vae". engines, onnx: folders that hold
    bundle.json and export.json ("" for the default places). device, decode_device: such as "cuda:0" ("" for the same
    one, or the CPU without a GPU). seconds: time limit of the whole; autotune: also torch.compile with max-autotune.
    """

    recipe: str
    steps: int = 4
    chunks: int = 4
    warmup: int = 5
    networks: tuple[str, ...] = NETWORKS
    against: str = ""
    engines: str = ""
    onnx: str = ""
    device: str = ""
    decode_device: str = ""
    out: str = ""
    seconds: int = 540
    autotune: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise LongtakeError for what cannot be measured."""
        for name, least in (("steps", 1), ("chunks", 1), ("warmup", 0), ("seconds", 10)):
            if getattr(self, name) < least:
                raise LongtakeError(f"bad --{name}", got=getattr(self, name), expected=f"{least} or more")
        if not self.networks or set(self.networks) - set(NETWORKS):
            raise LongtakeError("bad --networks", got=",".join(self.networks), expected="dit, vae or dit,vae")
        if self.against not in ("", *AGAINST):
            raise LongtakeError("bad --against", got=self.against, expected=" | ".join(AGAINST))

    @property
    def model(self) -> Preset:
        return self.the_recipe.model

    @property
    def the_recipe(self) -> Recipe:
        return recipe_named(self.recipe)

    @property
    def warm_chunks(self) -> int:
        """Chunks before the steady state: the window is full and the shot sink is pinned."""
        return max(self.warmup, self.model.window_chunks)

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def parts(self) -> tuple[str, ...]:
        """The parts to run, in order."""
        if not self.against:
            return PARTS[:1]
        wanted = [
            "engine",
            *(["torch"] if "dit" in self.networks else []),
            *(["torch_vae"] if "vae" in self.networks else []),
        ]
        if "dit" in self.networks:
            wanted += ["torch_compile", *(["torch_autotune"] if self.autotune else [])]
        return tuple(wanted)

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description, read back by `options_from_json`."""
        return asdict(self)


def options_from_json(given: dict[str, Any]) -> BenchOptions:
    """Read `BenchOptions.as_json` back."""
    return BenchOptions(**{**given, "networks": tuple(given["networks"])})
