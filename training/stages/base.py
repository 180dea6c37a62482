"""What a training stage is: the trainer runs any of them, the command line builds them by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.training.models.presets import Preset
from longtake.training.models.quantize import RULES, Rules
from longtake.training.objective.error_recycling import RecyclingConfig

Metric = float | Tensor


@dataclass(frozen=True)
class StageOptions:
    """What the command line knows; a stage reads what concerns it.

    data: "digits", "returning-digits" or a folder of clips. max_chunks_per_shot: see `data.folder.Folder`. precision: "bf16" or "nvfp4". amp: compute in bf16 on the GPU.
    init: folder of checkpoints to start from. vae: folder whose frozen VAE encodes the clips (None: the shipped one).
    stories, chunks: how many stories the latent cache holds, and the lengths in chunks that steps draw from.
    context: "full" history or the runtime's "window". recalibrate: steps between calibrations of the fake-quant.
    cpu_bf16: compute in bf16 on the CPU, too. decoder_only: (vae) keep the encoder and the latents' statistics.
    loss_weighting: see `noise.sample_levels`.
    cache_dir: where encoded stories are kept (None: in memory). workers: processes that decode and read ahead.
    max_bad_share: of a folder's clips; above it, training stops.
    graph: on a GPU, capture the DiT's forward and backward pass in a CUDA graph.
    i2v: share of the samples whose first frame is given. recycling: error recycling's settings (None: off).
    gradient_checkpointing: compute blocks again in the backward pass. attention: see `flex.chosen`.
    rules, quantize_gradients: of nvfp4, see `quantize.Rules` and `gradient_quant`.
    freeze_text: don't train the text encoder (a released one never is); its embeddings are then kept in cache_dir, too.
    accumulate: parts that a step's batch, so many times `batch`, is computed in, one after the other.
    """

    preset: Preset
    data: str = "digits"
    batch: int = 8
    precision: str = "bf16"
    amp: bool = True
    init: Path | None = None
    vae: Path | None = None
    seed: int = 0
    stories: int = 6000
    chunks: tuple[int, ...] = (4, 5, 6)
    context: str = "full"
    recalibrate: int = 100
    text_dropout: float = 0.1
    graph: bool = True
    cpu_bf16: bool = False
    decoder_only: bool = False
    loss_weighting: str = "bell"
    max_chunks_per_shot: int = 0
    cache_dir: Path | None = None
    workers: int = 0
    max_bad_share: float = 1.0
    i2v: float = 0.0
    recycling: RecyclingConfig | None = None
    gradient_checkpointing: bool = False
    attention: str = "auto"
    rules: Rules = RULES["static_6"]
    quantize_gradients: bool = False
    freeze_text: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        """Raise LongtakeError for numbers that nothing can be trained with."""
        for option, given, least, most, usual in (
            ("--batch", self.batch, 1, 1 << 16, 8),
            ("--stories", self.stories, 1, 10_000_000, 6000),
            ("--recalibrate", self.recalibrate, 1, 1 << 31, 100),
            ("--text-dropout", self.text_dropout, 0, 1, 0.1),
            ("--chunks", max(self.chunks), 1, 10_000, 6),
            ("--workers", self.workers, 0, 256, 4),
            ("--max-bad-share", self.max_bad_share, 0, 1, 0.5),
            ("--i2v", self.i2v, 0, 1, 0.5),
            ("--accumulate", self.accumulate, 1, 1 << 16, 1),
        ):
            if not least <= given <= most:
                raise LongtakeError(f"bad {option}", got=given, expected=f"{least} to {most}", fix=f"{option} {usual}")
        if self.precision != "nvfp4" and (self.quantize_gradients or self.rules != RULES["static_6"]):
            raise LongtakeError(
                "4-bit rules and gradients are of training under NVFP4", got=f"--precision {self.precision}",
                fix="--precision nvfp4, or leave them out",
            )  # fmt: skip

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder learns with the DiT: a released one never does."""
        return self.preset.text.kind == "words" and not self.freeze_text

    def computes_in_bf16(self, device: torch.device) -> bool:
        """Whether forward passes on `device` run under bf16 autocast."""
        return self.amp if device.type == "cuda" else self.cpu_bf16


class Stage(Protocol):
    """A training stage. `modules` are trained, averaged (EMA) and saved, each under its name.

    A stage may have `companions`: frozen checkpoints copied beside its own at the end, so that --out is complete.
    It may have `batch_name`: what the latest batch is called if it diverges. And `state() -> dict` of tensors with
    `load_state(dict)`, what resume points hold of it besides its modules. And `position() -> dict` with `seek(dict)`:
    its place in the data, JSON-ready, for resume points. And `losses(step, generator)`, an iterator of what `loss` gives,
    in parts to be added up: a part's backward pass comes before the next part is asked for.
    A stage module `training/stages/<name>.py` offers `stage_from_options(options: StageOptions) -> Stage`.
    """

    name: str
    modules: dict[str, nn.Module]

    def prepare(self, device: torch.device) -> None:
        """Move to `device`, build data sets and caches. Called once, before anything else."""

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Metric]]:
        """Loss of one step and metrics (tensors stay on the device until they are logged).

        All randomness comes from `generator` (CPU), or from device generators seeded from it.
        """

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics with the modules' present weights."""

    def samples(self) -> Tensor | None:
        """Something to look at: uint8 [N, T, 3, H, W], or None."""

    def metadata(self) -> dict[str, dict[str, Any]]:
        """What to save beside each module: module name -> JSON-ready facts (amax, vocabulary, settings)."""

    def on_step(self, step: int) -> None:
        """Called before the loss of `step` (0-based), for instance to calibrate quantizers again."""
