"""Stage "distill" of a world: DMD of a chunk-causal model to a student of a few steps, on walks of its own.

The student begins as --student, the chunk-causal model; --teacher is the real score, which may have been trained to see a
walk as a whole. The critic begins as the teacher. Text encoders stay as they are: the student keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.data.latent_cache import frozen_vae, vae_checkpoint, vae_mismatch
from longtake.training.data.rooms.latents import walks_from_rooms
from longtake.training.data.rooms.rooms import Rooms
from longtake.training.distill.base import DMDStage
from longtake.training.distill.metadata import student_metadata
from longtake.training.distill.networks import Networks
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.scores import dmd_loss
from longtake.training.distill.walks import (
    WalkScene,
    roll_out,
    score_levels,
    score_x0,
    student_schedule,
    walk_gradient,
    with_latents,
)
from longtake.training.models.checkpoint import load_into
from longtake.training.models.families import family_of
from longtake.training.models.load import read_side
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import AnyTextEncoder, text_encoder_for
from longtake.training.objective.walk_forcing import Levels, flow_loss, predict
from longtake.training.stages.base import Loss
from longtake.training.stages.validation import EVALUATION_SEED
from longtake.training.stages.world import require_rooms

HELD_OUT = 16
LossOf = Callable[[WalkScene, Tensor, Levels], Loss]


def require_world_student(options: DistillOptions, sample_steps: int = 0) -> None:
    """Raise LongtakeError for what no world is distilled with, before anything is made."""
    refused = {
        "--rollout": options.rollout,
        "--lora-rank": options.lora_rank,
        "--gradient-checkpointing": options.gradient_checkpointing,
        "--cache-dir": options.cache_dir,
        "--score-context": options.score_context != "clean",
        "--cache": options.cache != "nvfp4",
        "--i2v": options.i2v,
        "--sample-steps": sample_steps,
    }
    require_rooms(options.data, refused)


class WorldDistillStage(DMDStage):
    """See `DMDStage`."""

    def __init__(self, options: DistillOptions) -> None:
        require_world_student(options)
        self.options, self.preset = options, options.preset
        start = options.student or options.teacher
        self.rooms = {split: Rooms(self.preset, split) for split in ("train", "eval")}
        self.text, self.teacher_text = text_of(start, self.preset), text_of(options.teacher, self.preset)
        if self.text.vocabulary != self.teacher_text.vocabulary:
            raise LongtakeError(
                "student and teacher know other words",
                got=f"{len(self.text.vocabulary)} and {len(self.teacher_text.vocabulary)} words",
                expected="the same ones",
                fix="train the student from the teacher: longtake train --stage dit --init TEACHER",
            )
        family = family_of(self.preset)
        self.teacher, self.first = family.dit(self.preset), family.dit(self.preset)
        side = load_into(self.teacher, options.teacher / "dit.safetensors", kind="dit", preset=self.preset)
        begun = load_into(self.first, start / "dit.safetensors", kind="dit", preset=self.preset)
        self.teacher_digest, self.student_digest = side.sha256, begun.sha256
        self.context = str(side.facts.get("context", "full"))
        self.companions = [vae_checkpoint(self.preset, options.vae, start), start / "text_encoder.safetensors"]
        self.schedule = student_schedule(self.preset, options.student_steps)

    def prepare(self, device: torch.device) -> None:
        """Encode the walks; three networks, quantized where the student is."""
        self.device, self.device_generator = device, torch.Generator(device)
        vae, self.vae_digest = frozen_vae(self.companions[0], self.preset, device)
        for start in {self.options.teacher, self.options.student or self.options.teacher}:
            if other := vae_mismatch(start, self.companions[0], self.vae_digest):
                raise other
        count, chunks = self.options.stories, max(self.options.chunks)
        made = (("train", count, self.options.seed), ("eval", min(HELD_OUT, count), EVALUATION_SEED))
        self.train, self.held_out = (
            walks_from_rooms(
                self.rooms[split], vae, self.text, walks, chunks, seed, f"{split} walks", self.options.workers
            )
            for split, walks, seed in made
        )
        for text in (self.text, self.teacher_text):
            text.requires_grad_(False).eval().to(device)
        nothing = self.text.tokenize([self.preset.negative_prompt]).to(device)
        with torch.no_grad(), self.autocast():
            self.nothing = self.teacher_text(nothing)
        self.networks = Networks(self.teacher, self.options, device, self.first)
        self.start()

    def scene(self, generator: torch.Generator) -> WalkScene:
        """Random walks of one length, and one exit step for all of them."""
        choices, options = self.options.chunks, self.options
        chunks = choices[int(torch.randint(len(choices), (), generator=generator))]
        index = torch.randint(len(self.train), (options.accumulate * options.batch,), generator=generator)
        exit_step = int(torch.randint(options.student_steps, (), generator=generator))
        self.device_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return self.scene_of(self.train, index, chunks, exit_step, self.device_generator)

    @torch.no_grad()
    def scene_of(
        self, source: Any, index: Tensor, chunks: int, exit_step: int, generator: torch.Generator
    ) -> WalkScene:
        """The walks `index`, which is on the host, with noise of `generator`."""
        walks = source.rows(index.to(self.device), self.preset, chunks)
        with self.autocast():
            text, scored = self.text(walks.tokens), self.teacher_text(walks.tokens)
        return WalkScene(walks, text, scored, self.noise_like(walks.latents, generator), exit_step)

    def noise_like(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(latents.shape, generator=generator, device=generator.device).to(self.device)

    def generate(self, scene: WalkScene, gradient: bool = False) -> Tensor:
        """The student's walks, fp32 [B, C, F, h, w]."""
        dit: Any = self.networks.generator()
        with self.autocast():
            return roll_out(dit, self.preset, scene, self.schedule, scene.exit_step, gradient)

    def score_noise(self, scene: WalkScene, generator: torch.Generator) -> tuple[Tensor, Levels]:
        """What the scores see a scene's videos under."""
        batch, _, frames = scene.noise.shape[:3]
        levels = score_levels(self.preset, frames, batch, generator, self.context == "whole")
        return self.noise_like(scene.noise, generator), Levels(levels.frames.to(self.device))

    def generator_losses(self, scene: WalkScene) -> Iterator[Loss]:
        """See `DMDStage`."""
        return self.in_parts(self.generator_loss, scene)

    def critic_losses(self, scene: WalkScene) -> Iterator[Loss]:
        """See `DMDStage`."""
        return self.in_parts(self.critic_loss, scene)

    def in_parts(self, loss_of: LossOf, scene: WalkScene) -> Iterator[Loss]:
        """A part's backward pass comes before the next part is asked for."""
        parts, (eps, levels) = self.options.accumulate, self.score_noise(scene, self.device_generator)
        for rows in (slice(n * self.options.batch, (n + 1) * self.options.batch) for n in range(parts)):
            loss, metrics = loss_of(scene.part(rows), eps[rows], Levels(levels.frames[rows]))
            yield loss / parts, {name: value / parts for name, value in metrics.items()}

    def generator_loss(self, scene: WalkScene, eps: Tensor, levels: Levels) -> Loss:
        """DMD's loss on the student's own walks; their first frames do not count."""
        made = self.generate(scene, gradient=True)
        video, text = with_latents(scene.walks, made.detach()), scene.scored
        networks: Any = self.networks
        with torch.no_grad(), self.autocast():
            c, fake = (
                score_x0(dit, self.preset, video, text, eps, levels, self.context)
                for dit in (networks.real(), networks.fake())
            )
            without = self.nothing.expand_as(text)
            u = score_x0(networks.real(), self.preset, video, without, eps, levels, self.context)
            real = c + self.options.guidance * (c - u)
        own, real, fake = (x.transpose(1, 2) for x in (video.latents, real, fake))
        counted = levels.frames[..., 1] > 0
        gradient = walk_gradient(self.preset, own, real, fake, counted, self.context == "whole")
        return dmd_loss(made.transpose(1, 2), gradient, counted).float(), {"dmd_gradient": gradient.abs().mean()}

    def critic_loss(self, scene: WalkScene, eps: Tensor, levels: Levels) -> Loss:
        """The fake score's flow loss on the student's walks."""
        with torch.no_grad():
            video = with_latents(scene.walks, self.generate(scene))
        return self.flow_of(self.networks.fake(), video, scene.scored, eps, levels), {}

    def flow_of(self, dit: Any, video: Any, text: Tensor, eps: Tensor, levels: Levels) -> Tensor:
        """A score's flow loss on videos."""
        with self.autocast():
            velocity = predict(dit, self.preset, video, text, eps, levels, self.context)
        return flow_loss(velocity, video, eps, levels)[1]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out walks: how likely the teacher finds the student's videos (flow loss), and how strong they are."""
        self.networks.recalibrate(self.calibration(0))
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        index = torch.arange(min(len(self.held_out), self.options.batch))
        last, chunks = self.options.student_steps - 1, max(self.options.chunks)
        scene = self.scene_of(self.held_out, index, chunks, last, generator)
        made = self.generate(scene)
        eps, levels = self.score_noise(scene, generator)
        video = with_latents(scene.walks, made)
        return {
            "loss": float(self.flow_of(self.networks.real(), video, scene.scored, eps, levels)),
            "latents_std": float(made.std()),
            "data_std": float(scene.walks.latents.std()),
        }

    def roll_out(self, dit: Any, index: Tensor, generator: torch.Generator) -> None:
        last = self.options.student_steps - 1
        scene = self.scene_of(self.train, index, max(self.options.chunks), last, generator)
        with torch.no_grad(), self.autocast():
            roll_out(dit, self.preset, scene, self.schedule, last)

    def metadata(self) -> dict[str, dict[str, Any]]:
        """What the student is, and how it is sampled: its steps, without guidance."""
        facts = student_metadata(self.options, self.vae_digest, self.teacher_digest, self.amax())
        facts["sampling"] |= {"timesteps": list(self.schedule.timesteps)}
        facts["distillation"] |= {"cache": "bf16", "score_context": self.context, "student_sha256": self.student_digest}
        return {"dit": {**facts, "i2v": 1.0}}


def text_of(folder: Path, preset: Preset) -> AnyTextEncoder:
    """The text encoder of a folder of checkpoints."""
    path = folder / "text_encoder.safetensors"
    text = text_encoder_for(preset, read_side(path, "text_encoder", preset).vocabulary, folder)
    load_into(text, path, kind="text_encoder", preset=preset)
    return text
