"""Options that training and distillation have in common: one field is the option everywhere (`longtake.options`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from longtake.errors import LongtakeError
from longtake.formats.model_name import checkpoints_named
from longtake.options import DECISIVE, FREE, Bounds, OneOf, Text, option
from longtake.training.data.base import Dataset
from longtake.training.data.returns import distance_span, distance_text
from longtake.training.models.families import preset_named
from longtake.training.models.presets import TINY, Preset
from longtake.training.models.quantize import RULES, Rules
from longtake.video_span import FITS

DIT, VAE = "dit", "vae"  # the stages that record what they were trained with


def chunk_choices(text: str) -> tuple[int, ...]:
    """ "5", "4..6" or "1,1,5" to the lengths that are drawn from, all equally often."""
    try:
        first, _, last = text.partition("..")
        choices = tuple(range(int(first), int(last) + 1)) if last else tuple(int(part) for part in text.split(","))
    except ValueError:
        choices = ()
    if not choices or min(choices) < 1:
        raise LongtakeError(
            "bad --chunks", got=repr(text), expected="N, N..M with 1 <= N <= M, or N,N,...", fix="--chunks 4..6"
        )
    return choices


def chunk_text(choices: tuple[int, ...]) -> str:
    """What `chunk_choices` reads."""
    row = len(choices) > 1 and choices == tuple(range(choices[0], choices[-1] + 1))
    return f"{choices[0]}..{choices[-1]}" if row else ",".join(map(str, choices))


Chunks = Annotated[tuple[int, ...], Text(chunk_choices, chunk_text), Bounds(1, 10_000, 6)]
ReturnDistance = Annotated[tuple[int, ...], Text(distance_span, distance_text), Bounds(1, 10_000)]
Stories = Annotated[int, Bounds(1, 10_000_000)]


@dataclass(frozen=True)
class Seeded:
    """What"""

    seed: int = option(0)
    """of everything that is drawn at random"""


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    preset: Annotated[Preset, Text(preset_named, lambda preset: preset.label)] = option(TINY, metavar="NAME")
    """sizes of the networks: a shipped preset, or a .yaml file"""
    vae: Annotated[Path, Text(checkpoints_named)] | None = option(None, metavar="FOLDER")
    """folder of the frozen VAE (default: the one beside --init or --teacher, else the shipped one)"""
    precision: Annotated[str, OneOf(("bf16", "nvfp4"))] = option("bf16", resume=DECISIVE)
    """nvfp4: W4A4 fake-quant in the loop (distill: of the student, with LoRA of the shared base)"""
    nvfp4_rules: Annotated[str, OneOf(tuple(sorted(RULES)))] = option("static_6")
    """nvfp4: rules of the block scales, those of engines (static_6) or of LongLive's stages, whose activations by mse no
    TensorRT engine has"""
    recalibrate: Annotated[int, Bounds(1, 1 << 31)] = option(100, metavar="N")
    """nvfp4: refresh amax every N steps"""
    fp32: bool = option(False)
    """compute in fp32 on the GPU too (there it is bf16 otherwise)"""
    gradient_checkpointing: bool = option(False)
    """compute each block again in the backward pass: the same gradients from less memory and a third more work"""
    graph: bool = option(True, resume=FREE)
    """GPU: launch every kernel by itself (no CUDA graph)"""

    @property
    def rules(self) -> Rules:
        """NVFP4 rules by name."""
        return RULES[self.nvfp4_rules]


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    data: str = option("digits", metavar="NAME|FOLDER", resume=DECISIVE, recorded=(DIT, VAE))
    """"digits" (needs no download), "returning-digits" (prompts leave the colours of known subjects to the past) or clips
    of your own: a folder, a table of files and captions, or a tar (docs/training.md)"""
    fit: Annotated[str, OneOf(FITS)] = option("crop", recorded=(DIT, VAE))
    """clips of another shape than the preset's: crop the middle, pad with black, or stretch"""
    held_out: Annotated[int, Bounds(0, name="--held-out")] | None = option(None, metavar="N", recorded=(DIT, VAE))
    """clips (or films of several shots) that are kept for evaluation (default: one in five)"""
    batch: Annotated[int, Bounds(1, 1 << 16, name="--batch: bad batch size")] = option(
        8, metavar="N", recorded=(DIT, VAE)
    )
    """clips or stories a step; of mixed lengths, short ones come in larger batches, so that every step has about as many
    chunks"""
    accumulate: Annotated[int, Bounds(1, 1 << 16)] = option(1, metavar="N")
    """a step's batch is N times --batch, computed in N parts whose gradients add up"""
    stories: Stories = option(6000, metavar="N", recorded=(DIT,))
    """stories that are drawn from"""
    chunks: Chunks = option((4, 5, 6), metavar="N..M", recorded=(DIT,))
    """length of a story in chunks, drawn for every step: N, N..M or a list such as 1,1,5; longer ones also train the
    sinks"""
    return_distance: ReturnDistance | None = option(None, metavar="N..M", resume=DECISIVE, recorded=(DIT,))
    """"returning-digits": how many chunks others have before the first subject returns, again and again (default: once,
    as far as stories of 8 chunks let it)"""
    cache_dir: Path | None = option(None, metavar="FOLDER", resume=FREE)
    """keep the encoded stories there (they are taken in epochs, each once), and the embeddings of prompts where the text
    encoder is frozen (default: in memory)"""
    workers: Annotated[int, Bounds(0, 256, 4)] = option(0, metavar="N", resume=FREE)
    """processes that decode, or render, and read ahead (same order for any N)"""

    def dataset(self, split: str, **folders: Any) -> Dataset:
        """A split of the data set. folders: what else is told of those, see `dataset_from_name`."""
        from longtake.training.data.named import dataset_from_name

        told = {name: getattr(self, name) for name in ("preset", "fit", "held_out", "return_distance")}
        return dataset_from_name(self.data, split=split, **told, **folders)


@dataclass(frozen=True)
class RunOptions(Seeded):
    """How long, and what is kept"""

    out: Path = option(metavar="FOLDER", resume=FREE)
    """folder for checkpoints and curves"""
    steps: int = option(1000, metavar="N")
    """optimizer steps, which the learning rate's schedule is stretched over"""
    stop_at: int | None = option(None, metavar="STEP", resume=FREE)
    """stop early, resumable, without changing the schedule (default: --steps)"""
    max_seconds: float = option(math.inf, metavar="S", resume=FREE)
    """stop and save when this time is over; it counts from the start, preparation included"""
    resume: bool = option(False, resume=FREE)
    """go on from the newest resume point in --out"""
    save_steps: int = option(0, metavar="N", resume=FREE)
    """resume point every N steps; 0: by time only"""
    save_seconds: float = option(300.0, metavar="S", resume=FREE)
    """... and every S seconds"""
    evaluate_steps: int = option(1000, metavar="N", resume=FREE)
    """held-out metrics every N steps; 0: at the end only"""
    sample_steps: int = option(0, metavar="N", resume=FREE)
    """sample videos to TensorBoard every N steps; 0: with each evaluation"""
    save_dtype: Annotated[str, OneOf(("fp32", "bf16"))] = option("fp32", resume=FREE)
    """of the final checkpoints"""
