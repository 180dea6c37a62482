"""What to measure, as one value that travels to the processes that measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe, recipe_named
from longtake.options import Bounds, Text, check, option
from longtake.training.models.presets import Preset

NETWORKS = ("dit", "vae")
AGAINST = ("torch",)
PLAIN = ("wan", "sana_wm")  # the families whose networks are written out in plain PyTorch, to be measured against
# Parts in the order they run, each in a process of its own: its memory is its own, and its failure or delay as well.
PARTS = ("engine", "ranks", "torch", "torch_vae", "torch_compile", "torch_autotune")


def networks_of(text: str) -> tuple[str, ...]:
    """ "dit,vae" to its words."""
    return tuple(part for part in text.split(",") if part)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured"""

    recipe: str = option(metavar="NAME")
    """a shipped recipe or a .yaml file"""
    steps: Annotated[int, Bounds(1)] = option(4, metavar="N")
    """denoise steps a chunk, besides the clean pass"""
    chunks: Annotated[int, Bounds(1, usual=4)] | None = option(None, metavar="N")
    """steady chunks measured in each mode (default 4)"""
    warmup: Annotated[int, Bounds(0, usual=5)] | None = option(None, metavar="K")
    """chunks before that (default 5; the window's at least)"""
    quick: bool = option(False)
    """1 steady chunk, shortest warm-up"""
    networks: Annotated[tuple[str, ...], Text(networks_of, ",".join)] = option(NETWORKS, metavar="dit,vae")
    """what to measure"""
    against: str = option("", metavar="torch")
    """measure plain PyTorch in the same run, too (default: not)"""
    engines: str = option("", metavar="FOLDER")
    """plans are in FOLDER/RECIPE, built if absent (default: LONGTAKE_HOME/models/skeleton/RECIPE/engines)"""
    onnx: str = option("", metavar="FOLDER")
    """graphs are in FOLDER/PRESET_PRECISION, exported if absent (default: LONGTAKE_HOME/models/skeleton/RECIPE/onnx)"""
    device: str = option("", metavar="cuda:N")
    """where networks run (default: the first GPU, or the CPU without one)"""
    decode_device: str = option("", metavar="cuda:N")
    """decode on this GPU (default: the same)"""
    gpus: Annotated[int, Bounds(1)] = option(1, metavar="P")
    """measure one video on P GPUs in the same run, too (segmented recipes; with --device cpu, on processes in PyTorch)"""
    kept_windows: Annotated[int, Bounds(0)] | None = option(None, metavar="LAYERS")
    """layers that keep their window laid out between the passes of a chunk (default: as many as the memory allows)"""
    out: str = option("", metavar="FOLDER")
    """where reports are written (default: runs/bench/RECIPE)"""
    seconds: Annotated[int, Bounds(10)] = option(540, metavar="S")
    """time limit of the whole"""
    force: bool = option(False)
    """measure an export that failed its comparison with PyTorch"""
    autotune: bool = option(False)
    """also torch.compile with max-autotune (minutes)"""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise LongtakeError for what cannot be measured."""
        check(self)
        if not self.networks or set(self.networks) - set(NETWORKS):
            raise LongtakeError("bad --networks", got=",".join(self.networks), expected="dit, vae or dit,vae")
        if self.against not in ("", *AGAINST):
            raise LongtakeError("bad --against", got=self.against, expected=" | ".join(AGAINST))
        if self.gpus > 1 and self.decode_device:
            raise LongtakeError(
                "--gpus and --decode-device are two ways to use a second GPU",
                got=f"--gpus {self.gpus} --decode-device {self.decode_device}",
                fix="leave one out",
            )

    def require_plain(self) -> None:
        """Raise LongtakeError if PyTorch is to be measured beside a model that is not written out in it."""
        if self.against and self.model.family not in PLAIN:
            raise LongtakeError(
                "there is no plain PyTorch of this model to measure against",
                got=f"--against {self.against} with preset {self.model.name}, of family {self.model.family}",
                expected=f"a preset of family {', '.join(PLAIN)}",
                fix="leave --against out",
            )

    @property
    def model(self) -> Preset:
        return self.the_recipe.model

    @property
    def the_recipe(self) -> Recipe:
        return recipe_named(self.recipe)

    @property
    def warm_chunks(self) -> int:
        """Chunks before the steady state: the window is full and the shot sink is pinned."""
        usual = 0 if self.quick else 5
        return max(usual if self.warmup is None else self.warmup, self.model.window_chunks)

    @property
    def steady_chunks(self) -> int:
        """Chunks measured in each mode."""
        usual = 1 if self.quick else 4
        return usual if self.chunks is None else self.chunks

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def parts(self) -> tuple[str, ...]:
        """The parts to run, in order."""
        dit = ("torch", "torch_compile", *(("torch_autotune",) if self.autotune else ()))
        theirs = (*(dit if "dit" in self.networks else ()), *(("torch_vae",) if "vae" in self.networks else ()))
        ours = ("engine", *(("ranks",) if self.gpus > 1 else ()))
        return tuple(part for part in PARTS if part in ours or (self.against and part in theirs))

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready description, read back by `options_from_json`."""
        return asdict(self)


def options_from_json(given: dict[str, Any]) -> BenchOptions:
    """Read `BenchOptions.as_json` back."""
    return BenchOptions(**{**given, "networks": tuple(given["networks"])})
