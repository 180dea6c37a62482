"""Stage "dit" of a world: its transformer and text encoder, trained together on walks through rooms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.data.latent_cache import frozen_vae, vae_mismatch
from longtake.training.data.rooms.latents import Walks, walks_from_rooms
from longtake.training.data.rooms.rooms import Rooms
from longtake.training.models.quantize import insert_quantizers
from longtake.training.objective.walk_forcing import FIRST_GIVEN, Levels, draw_levels, flow_loss, predict, spans_of
from longtake.training.stages.base import Loss
from longtake.training.stages.options import StageOptions
from longtake.training.stages.transformer import TransformerStage
from longtake.training.stages.validation import EVALUATION_SEED

HELD_OUT = 32


def require_world(options: StageOptions, sample_steps: int = 0) -> None:
    """Raise LongtakeError for what no world is trained with, before anything is made."""
    refused = {
        "--error-recycling": options.error_recycling,
        "--quantize-gradients": options.quantize_gradients,
        "--gradient-checkpointing": options.gradient_checkpointing,
        "--cache-dir": options.cache_dir,
        "--text-encoder": options.text_encoder,
        "--attention": options.attention != "auto",
        "--sample-steps": sample_steps,
    }
    require_rooms(options.data, refused)
    if options.preset.text.kind != "words":
        raise LongtakeError(
            f"preset {options.preset.name} is not trained here: its text encoder is a released one",
            got=options.preset.text.kind,
            expected="a text encoder of kind words",
            fix="pass --preset world-tiny",
        )


def require_rooms(data: str, refused: Mapping[str, object]) -> None:
    """Raise LongtakeError for data without cameras, and for options of other models: `refused` says which are asked for."""
    if data != "rooms":
        raise LongtakeError(
            "a world learns from videos with cameras", got=f"--data {data}", expected="rooms", fix="pass --data rooms"
        )
    if asked := [name for name, value in refused.items() if value]:
        raise LongtakeError("this is not for worlds", got=", ".join(asked), fix=f"leave {asked[0]} out")


class WorldStage(TransformerStage):
    """See `stages.base.Stage`."""

    def __init__(self, options: StageOptions) -> None:
        require_world(options)
        self.rooms = {split: Rooms(options.preset, split) for split in ("train", "eval")}
        super().__init__(options, self.rooms["train"].captions)
        self.given = options.i2v or FIRST_GIVEN

    def prepare(self, device: torch.device) -> None:
        """Encode the walks; insert quantizers when training under NVFP4."""
        self.device, self.device_generator = device, torch.Generator(device)
        vae, self.vae_digest = frozen_vae(self.companions[0], self.preset, device)
        if self.options.init is not None and self.options.vae is None:
            if other := vae_mismatch(self.options.init, self.companions[0], self.vae_digest):
                raise other
        count, chunks = self.options.stories, max(self.options.chunks)
        made = (("train", count, self.options.seed), ("eval", min(HELD_OUT, count), EVALUATION_SEED))
        self.train, self.held_out = (
            walks_from_rooms(
                self.rooms[split], vae, self.text, walks, chunks, seed, f"{split} walks", self.options.workers
            )
            for split, walks, seed in made
        )
        self.dit.to(device)
        self.text.to(device)
        if self.options.precision == "nvfp4":
            insert_quantizers(self.dit, self.calibration(0), rules=self.options.rules)

    def autocast(self) -> AbstractContextManager[None]:
        enabled = self.options.computes_in_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def draw(self, walks: Walks, generator: torch.Generator) -> tuple[Tensor, Levels]:
        """Noise of a batch and its levels, from a generator on any device."""
        eps = torch.randn(walks.latents.shape, generator=generator, device=generator.device)
        chunks = self.preset.whole_chunks(walks.latents.shape[2])
        spans = spans_of(self.preset, chunks, self.options.context == "whole")
        levels = draw_levels(spans, len(walks), self.given, generator, self.options.loss_weighting)
        return eps.to(self.device), Levels(levels.frames.to(self.device))

    def batch(self, generator: torch.Generator) -> Walks:
        """Random walks of one random length."""
        choices = self.options.chunks
        chunks = choices[int(torch.randint(len(choices), (), generator=generator))]
        index = torch.randint(len(self.train), (self.options.batch,), generator=generator)
        return self.train.rows(index.to(self.device), self.preset, chunks)

    def embed(self, tokens: Tensor) -> Tensor:
        """Of tokens int32 [B, E]; a share of prompts is left out in training, so that the model can go without."""
        with self.autocast():
            return self.text(tokens)  # type: ignore[no-any-return]

    def velocity(self, walks: Walks, eps: Tensor, levels: Levels) -> Tensor:
        with self.autocast():
            return predict(self.dit, self.preset, walks, self.embed(walks.tokens), eps, levels, self.options.context)

    def losses(self, step: int, generator: torch.Generator) -> Iterator[Loss]:
        """Weighted flow loss of random batches, their mean in parts."""
        share = 1 / self.options.accumulate
        for _ in range(self.options.accumulate):
            walks = self.batch(generator)
            self.device_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            drawn = torch.rand(len(walks), 1, generator=self.device_generator, device=self.device)
            told = walks.tokens * (drawn >= self.options.text_dropout)
            walks = Walks(walks.latents, told, walks.poses, walks.intrinsics)
            eps, levels = self.draw(walks, self.device_generator)
            loss, plain = flow_loss(self.velocity(walks, eps, levels), walks, eps, levels)
            yield loss * share, {"flow": plain.detach() * share}

    def look(self, generator: torch.Generator) -> None:
        walks = self.batch(generator)
        self.velocity(walks, *self.draw(walks, generator))

    def held_out_flow(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        walks = self.held_out.rows(index, self.preset, max(self.options.chunks))
        eps, levels = self.draw(walks, generator)
        return flow_loss(self.velocity(walks, eps, levels), walks, eps, levels)

    def metadata(self) -> dict[str, dict[str, Any]]:
        """Amax of the quantized linears (calibrated for the present weights), vocabulary, and what it was trained on."""
        return {name: {**told, "i2v": self.given} for name, told in super().metadata().items()}
