"""Stage "distill": DMD of a teacher-forced DiT to a student of a few steps (see `stages.base.Stage`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.training.data.base import told
from longtake.training.data.embedding_cache import CachedText
from longtake.training.data.latent_cache import frozen_vae, vae_checkpoint, vae_mismatch
from longtake.training.distill.base import DMDStage
from longtake.training.distill.learnt import scored, scored_chunks
from longtake.training.distill.metadata import student_metadata
from longtake.training.distill.networks import Networks
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.rollout import Rollout
from longtake.training.distill.scene import Scene, SceneSampler
from longtake.training.distill.scores import GraphedScorer, Scorer, critic_loss, dmd_gradient, dmd_loss, draw_levels
from longtake.training.models.checkpoint import load_into
from longtake.training.models.load import read_side
from longtake.training.models.text.words import TextEncoder, text_encoder_for
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.objective.accumulate import parts_of
from longtake.training.objective.chunk_pass import ChunkPass, GraphedChunkPass
from longtake.training.objective.teacher_forcing import Noise
from longtake.training.stages.base import Loss
from longtake.training.stages.initial_models import leave_tokenizer
from longtake.training.stages.precompute import Stories, embeddings_of, stories_of
from longtake.training.stages.validation import EVALUATION_SEED

HELD_OUT = 16
LossOf = Callable[[Scene, Noise], Loss]


class DistillStage(DMDStage):
    """See `DMDStage`."""

    def __init__(self, options: DistillOptions) -> None:
        self.options, self.preset = options, options.preset
        preset, folder = options.preset, options.teacher
        text_file = folder / "text_encoder.safetensors"
        self.text = text_encoder_for(preset, read_side(text_file, "text_encoder", preset).vocabulary, folder)
        self.clips, self.held_out_clips = options.dataset("train"), options.dataset("eval")
        self.line = told(self.clips, self.held_out_clips, chunks=options.longest)
        if isinstance(self.text, TextEncoder):
            self.text.tokenizer.check(self.clips.captions)
        self.teacher = CausalDiT(preset.dit)
        self.companions = [vae_checkpoint(preset, options.vae, folder), text_file]
        self.text_digest = load_into(self.text, text_file, kind="text_encoder", preset=preset).sha256
        self.cached_text: CachedText | None = None
        self.teacher_digest = load_into(self.teacher, folder / "dit.safetensors", kind="dit", preset=preset).sha256
        self.rollout = Rollout(preset, options.student_steps, options.cache)
        self.scorer: Scorer = Scorer(preset, options.score_context)
        self.passes: ChunkPass | None = None

    def prepare(self, device: torch.device) -> None:
        """Load the stories; quantizers and adapters; no text encoder is trained."""
        self.device = device
        self.device_generator = torch.Generator(device)
        self.text.requires_grad_(False).eval()
        self.vae, self.vae_digest = frozen_vae(self.companions[0], self.preset, device)
        if other := vae_mismatch(self.options.teacher, self.companions[0], self.vae_digest):
            raise other
        self.train = self.stories("train", self.options.stories, self.options.seed)
        self.held_out = self.stories("eval", min(HELD_OUT, self.options.stories), EVALUATION_SEED)
        self.scenes, self.held_out_scenes = (
            SceneSampler(stories, self.options, self.embed, device) for stories in (self.train, self.held_out)
        )
        nothing = self.text.tokenize([self.preset.negative_prompt]).to(device)
        self.cached_text = self.cache_text(nothing)
        if self.cached_text is None:
            self.text.to(device)
        self.nothing = self.embed(nothing)[0]
        self.networks = Networks(self.teacher, self.options, device)
        self.start()
        if self.options.captures(device):
            self.capture()

    def leave(self, out: Path) -> None:
        """The tokenizer of a text encoder that has one in a file."""
        leave_tokenizer(self.text, out)

    def capture(self) -> None:
        """Let CUDA graphs run the generator's passes and the scores."""
        dit, cache = self.networks.generator(), self.options.cache
        with self.autocast():
            dtype = self.rollout.kept_dtype(dit, self.device)
        self.passes = GraphedChunkPass(dit, cache, dtype, self.autocast)
        self.scorer = GraphedScorer(self.preset, self.options.score_context, self.autocast)

    def stories(self, split: str, count: int, seed: int) -> Stories:
        """Encoded stories of a split of the data set."""
        return stories_of(self, split, count, seed, self.options.longest, "window")

    def cache_text(self, nothing: Tensor) -> CachedText | None:
        """Embeddings of all prompts and of `nothing` on disk, where there is a folder for them."""
        return embeddings_of(self, nothing.cpu())

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int32 [P, E] -> fp32 embeddings [P, E, dim], computed or from the cache, without gradient."""
        with torch.no_grad(), self.autocast():
            return (self.cached_text or self.text)(tokens)  # type: ignore[no-any-return]

    # ---- batches -------------------------------------------------------------------------------------------------

    def scene(self, generator: torch.Generator) -> Scene:
        """A random scene of the training stories."""
        return self.scenes.random(generator, self.device_generator)

    def generate(self, scene: Scene, gradient: bool = False) -> Tensor:
        """The student's video, fp32 [B, F, C, H, W]."""
        with self.autocast():
            return self.rollout(
                self.networks.generator(), scene.story, scene.exit_step, gradient, self.passes, scene.learnt
            )

    def score_noise(self, scene: Scene, generator: torch.Generator) -> Noise:
        """What the scores see a scene's videos under."""
        per_block = self.options.i2v or self.options.score_context == "clean"
        like, shift = scene.story.noise, self.preset.sampling.shift
        chunks = scored_chunks(scene.clips.chunks, self.preset.window_chunks, scene.learnt)
        levels = draw_levels((len(like), chunks), shift, generator, per_block).to(self.device)
        shape = (len(like), chunks * self.preset.chunk_latents, *like.shape[2:])
        return Noise(torch.randn(shape, generator=generator, device=generator.device).to(self.device), levels)

    # ---- losses --------------------------------------------------------------------------------------------------

    def generator_losses(self, scene: Scene) -> Iterator[Loss]:
        """`generator_loss` of a scene, in parts that add up to it."""
        return self.in_parts(self.generator_loss, scene)

    def critic_losses(self, scene: Scene) -> Iterator[Loss]:
        """`critic_loss` of a scene, in parts that add up to it."""
        return self.in_parts(self.critic_loss, scene)

    def in_parts(self, loss_of: LossOf, scene: Scene) -> Iterator[Loss]:
        """A part's backward pass comes before the next part is asked for."""
        parts, noise = self.options.accumulate, self.score_noise(scene, self.device_generator)
        for number, (clips, drawn, share) in enumerate(parts_of(scene.clips, noise, parts)):
            size = len(clips.latents)
            loss, metrics = loss_of(scene.part(slice(number * size, (number + 1) * size)), drawn)
            yield loss * share, {name: value / parts for name, value in metrics.items()}

    def generator_loss(self, scene: Scene, noise: Noise) -> Loss:
        """DMD's loss on the student's own video."""
        clips, text, video = scored(self.preset, scene, self.generate(scene, gradient=True))
        with torch.no_grad(), self.autocast():
            real = self.scorer.guided_x0(self.networks.real(), text, self.nothing, clips, noise, self.options.guidance)
            fake = self.scorer.x0(self.networks.fake(), text, clips, noise)
        gradient = dmd_gradient(clips.latents, real, fake, clips.chunks, clips.counted)
        self.networks.generator()  # the backward pass is this one's
        return dmd_loss(video, gradient, clips.counted).float(), {"dmd_gradient": gradient.abs().mean()}

    def critic_loss(self, scene: Scene, noise: Noise) -> Loss:
        """The fake score's flow loss on the student's video."""
        clips, text, _ = scored(self.preset, scene, self.generate(scene))
        with self.autocast():
            velocity = self.scorer.velocity(self.networks.fake(), text, clips, noise)
        return critic_loss(velocity, clips, noise), {}

    # ---- the rest of a stage -------------------------------------------------------------------------------------

    def held_out_scene(self) -> Scene:
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        index = torch.arange(min(len(self.held_out), self.options.batch))
        last = self.options.student_steps - 1
        learnt = max(self.options.chunks)
        return self.held_out_scenes.of(index, self.options.longest, last, generator, learnt)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out prompts: how likely the teacher finds the student's videos (flow loss), and how strong they are."""
        self.networks.recalibrate(self.calibration(0))
        scene = self.held_out_scene()
        video = self.generate(scene)
        noise = self.score_noise(scene, torch.Generator().manual_seed(EVALUATION_SEED))
        clips, text, _ = scored(self.preset, scene, video)
        with self.autocast():
            velocity = self.scorer.velocity(self.networks.real(), text, clips, noise)
        return {
            "loss": float(critic_loss(velocity, clips, noise)),
            "latents_std": float(video.std()),
            "data_std": float(scene.clips.latents.std()),
        }

    @torch.no_grad()
    def samples(self) -> Tensor | None:
        """The student's videos of two held-out stories; GPU only."""
        if self.device.type != "cuda":
            return None
        with self.autocast():
            video = self.vae.decode(self.generate(self.held_out_scene())[:2])
        return ((video.float() * 0.5 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).transpose(1, 2)

    def roll_out(self, dit: Any, index: Tensor, generator: torch.Generator) -> None:
        last = self.options.student_steps - 1
        scene = self.scenes.of(index, max(self.options.chunks), last, generator)
        with torch.no_grad(), self.autocast():
            self.rollout(dit, scene.story, last)

    def metadata(self) -> dict[str, dict[str, Any]]:
        """What the student is, and how it is sampled: its steps, without guidance."""
        return {"dit": student_metadata(self.options, self.vae_digest, self.teacher_digest, self.amax())}
