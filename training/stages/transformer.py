"""What stages "dit" have in common: a transformer and its text encoder, measured for 4 bits or trained in them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.data.latent_cache import vae_checkpoint
from longtake.training.models.quantize import insert_quantizers, read_amax, recalibrate
from longtake.training.stages.base import Stage
from longtake.training.stages.initial_models import initial_models
from longtake.training.stages.metadata import dit_metadata
from longtake.training.stages.options import StageOptions
from longtake.training.stages.validation import EVALUATION_SEED

CALIBRATION_BATCHES = 4


class TransformerStage(Stage):
    """See `stages.base.Stage`. A stage prepares `held_out` and `vae_digest`."""

    name = "dit"
    device: torch.device
    held_out: Any
    vae_digest: str

    def __init__(self, options: StageOptions, captions: list[str]) -> None:
        """`captions`: those whose words the text encoder learns."""
        self.options, self.preset = options, options.preset
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.dit, self.text, self.text_digest = initial_models(options, captions)
        self.text.requires_grad_(options.trains_text)
        self.companions = [vae_checkpoint(self.preset, options.vae, options.init)]
        self.modules: dict[str, nn.Module] = {"dit": self.dit, "text_encoder": self.text}

    @abstractmethod
    def look(self, generator: torch.Generator) -> None:
        """A pass over a random training batch."""

    @abstractmethod
    def held_out_flow(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Weighted and plain flow loss of held-out samples, with noise of `generator`."""

    def calibration(self, step: int, batches: int = 1) -> Callable[[nn.Module], None]:
        """A run over training batches that depends on the seed and `step` only, for ModelOpt to measure amax on."""

        def run(dit: nn.Module) -> None:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
            for _ in range(batches):
                self.look(generator)

        return run

    def on_step(self, step: int) -> None:
        """Calibrate again every `recalibrate` steps, under NVFP4."""
        if self.options.precision == "nvfp4" and step % self.options.recalibrate == 0:
            recalibrate(self.dit, self.calibration(step))

    def evaluate(self) -> dict[str, float]:
        """Weighted ("loss") and plain ("flow") flow loss on held-out samples at fixed noise; under NVFP4 with amax of the
        present weights."""
        if self.options.precision == "nvfp4":
            recalibrate(self.dit, self.calibration(0, CALIBRATION_BATCHES))
        generator, totals = torch.Generator().manual_seed(EVALUATION_SEED), torch.zeros(2)
        for index in torch.arange(len(self.held_out)).split(max(1, min(self.options.batch, 8))):
            with torch.no_grad():
                totals += torch.stack(self.held_out_flow(index.to(self.device), generator)).cpu() * len(index)
        loss, flow = (totals / len(self.held_out)).tolist()
        return {"loss": loss, "flow": flow}

    def metadata(self) -> dict[str, dict[str, Any]]:
        """Amax of the quantized linears (calibrated for the present weights), vocabulary, and what it was trained on."""
        return dit_metadata(self.options, self.vae_digest, list(self.text.vocabulary), self.calibrated_amax())

    def calibrated_amax(self) -> dict[str, dict[str, float]]:
        """Amax for the present weights; a model trained in bf16 is measured on a quantized copy."""
        calibrate = self.calibration(0, CALIBRATION_BATCHES)
        if self.options.precision == "nvfp4":
            recalibrate(self.dit, calibrate)
            return read_amax(self.dit)
        trained, self.dit = self.dit, copy.deepcopy(self.dit)
        try:
            return read_amax(insert_quantizers(self.dit, calibrate))
        finally:
            self.dit = trained
