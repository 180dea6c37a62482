"""Stage "distill": DMD of a teacher-forced DiT to a student of a few steps (see `stages.base.Stage`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.checkpoint import load_into
from longtake.training.data.base import dataset_from_name
from longtake.training.distill.networks import Networks
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.rollout import Rollout, Story
from longtake.training.distill.scores import Scorer, critic_loss, dmd_gradient, dmd_loss, draw_levels
from longtake.training.dit import CausalDiT
from longtake.training.latent_cache import LatentCache, cache_from_dataset, frozen_vae, vae_checkpoint
from longtake.training.networks import load_meta
from longtake.training.quantize import insert_quantizers, read_amax
from longtake.training.stages.base import Metric
from longtake.training.teacher_forcing import Clips, Noise
from longtake.training.text_encoder import text_encoder_for

HELD_OUT = 16
EVALUATION_SEED = 20_000_003


@dataclass(frozen=True)
class Scene:
    """A batch to distil on. clips: of the data, whose latents matter for given frames only. story: what is generated."""

    clips: Clips
    story: Story
    exit_step: int


class DistillStage:
    """Generator and critic losses; `modules` is the generator's part, `critic_modules` the fake score's."""

    name = "distill"

    def __init__(self, options: DistillOptions) -> None:
        self.options, self.preset = options, options.preset
        preset, folder = options.preset, options.teacher
        text_file = folder / "text_encoder.safetensors"
        self.text = text_encoder_for(preset, load_meta(text_file, "text_encoder", preset).get("vocabulary"), folder)
        self.teacher = CausalDiT(preset.dit)
        self.companions = [vae_checkpoint(preset, options.vae), text_file]
        load_into(self.text, text_file, kind="text_encoder", preset=preset.name)
        self.teacher_facts = load_into(self.teacher, folder / "dit.safetensors", kind="dit", preset=preset.name)
        self.modules: dict[str, nn.Module] = {}
        self.critic_modules: dict[str, nn.Module] = {}
        self.rollout = Rollout(preset, options.student_steps, options.cache)
        self.scorer = Scorer(preset, options.score_context)

    def prepare(self, device: torch.device) -> None:
        """Load the stories; quantizers and adapters; no text encoder is trained."""
        self.device = device
        self.device_generator = torch.Generator(device)
        self.text.to(device).requires_grad_(False).eval()
        self.vae, self.vae_digest = frozen_vae(self.companions[0], self.preset, device)
        self.train = self.stories("train", self.options.stories, self.options.seed)
        self.held_out = self.stories("eval", min(HELD_OUT, self.options.stories), EVALUATION_SEED)
        with torch.no_grad():
            tokens = self.text.tokenize([self.preset.negative_prompt]).to(device)
            self.nothing = self.text(tokens)[0]
        self.networks = Networks(self.teacher, self.options, device)
        self.networks.prepare(self.calibration(0))
        generator, fake = self.networks.trained()
        self.modules, self.critic_modules = {"dit": generator}, {"fake_score": fake}

    def stories(self, split: str, count: int, seed: int) -> LatentCache:
        dataset = dataset_from_name(self.options.data, self.preset, split)
        return cache_from_dataset(
            dataset, self.vae, self.text, self.preset, stories=count, chunks=max(self.options.chunks),
            context="window", seed=seed, what=f"{split} stories",
        )  # fmt: skip

    def autocast(self) -> AbstractContextManager[None]:
        # No cache: a weight cast under no_grad must not serve a pass that wants a gradient.
        enabled = self.options.computes_in_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    # ---- batches -------------------------------------------------------------------------------------------------

    def scene(self, generator: torch.Generator) -> Scene:
        """Random prompts and cuts of one length, noise, and one exit step for all of them."""
        choices = self.options.chunks
        chunks = choices[int(torch.randint(len(choices), (), generator=generator))]
        index = torch.randint(len(self.train), (self.options.batch,), generator=generator)
        exit_step = int(torch.randint(self.options.student_steps, (), generator=generator))
        self.device_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return self.scene_of(self.train, index, chunks, exit_step, self.device_generator)

    def scene_of(
        self, stories: LatentCache, index: Tensor, chunks: int, exit_step: int, generator: torch.Generator
    ) -> Scene:
        """These stories' prompts and cuts, with noise of `generator`."""
        clips = stories.clips(index.to(self.device), chunks)
        given = torch.zeros(clips.latents.shape[:2], dtype=torch.bool, device=self.device)
        given[:, 0] = True
        clips = replace(clips, given=given if self.options.i2v else None)
        with torch.no_grad(), self.autocast():
            embeddings = self.text(clips.tokens.flatten(0, 1)).unflatten(0, clips.tokens.shape[:2])
        noise = torch.randn(clips.latents.shape, generator=generator, device=generator.device).to(self.device)
        first = clips.latents[:, 0] if self.options.i2v else None
        return Scene(clips, Story(embeddings, cuts_of(clips), noise, first), exit_step)

    def generate(self, scene: Scene, gradient: bool = False) -> Tensor:
        """The student's video, fp32 [B, F, C, H, W]."""
        with self.autocast():
            return self.rollout(self.networks.generator(), scene.story, scene.exit_step, gradient)

    def scored(self, scene: Scene, video: Tensor, generator: torch.Generator) -> tuple[Clips, Noise]:
        """The video as the scores see it, noised."""
        per_block = self.options.i2v or self.options.score_context == "clean"
        shape, shift = (len(video), scene.clips.chunks), self.preset.sampling.shift
        levels = draw_levels(shape, shift, generator, per_block).to(self.device)
        eps = torch.randn(video.shape, generator=generator, device=generator.device).to(self.device)
        return replace(scene.clips, latents=video.detach()), Noise(eps, levels)

    # ---- losses --------------------------------------------------------------------------------------------------

    def generator_loss(self, scene: Scene) -> tuple[Tensor, dict[str, Metric]]:
        """DMD's loss on the student's own video."""
        video = self.generate(scene, gradient=True)
        clips, noise = self.scored(scene, video, self.device_generator)
        text = scene.story.embeddings
        with torch.no_grad(), self.autocast():
            real = self.scorer.guided_x0(self.networks.real(), text, self.nothing, clips, noise, self.options.guidance)
            fake = self.scorer.x0(self.networks.fake(), text, clips, noise)
        gradient = dmd_gradient(clips.latents, real, fake, clips.chunks, clips.counted)
        self.networks.generator()  # the backward pass is this one's
        return dmd_loss(video, gradient, clips.counted).float(), {"dmd_gradient": gradient.abs().mean()}

    def critic_loss(self, scene: Scene) -> tuple[Tensor, dict[str, Metric]]:
        """The fake score's flow loss on the student's video."""
        video = self.generate(scene)
        clips, noise = self.scored(scene, video, self.device_generator)
        with self.autocast():
            velocity = self.scorer.velocity(self.networks.fake(), scene.story.embeddings, clips, noise)
        return critic_loss(velocity, clips, noise), {}

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Metric]]:
        """The critic's, of a batch of its own; the trainer of this stage takes both losses apart."""
        return self.critic_loss(self.scene(generator))

    # ---- the rest of a stage -------------------------------------------------------------------------------------

    def held_out_scene(self) -> Scene:
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        index = torch.arange(min(len(self.held_out), self.options.batch))
        last = self.options.student_steps - 1
        return self.scene_of(self.held_out, index, max(self.options.chunks), last, generator)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out prompts: how likely the teacher finds the student's videos (flow loss), and how strong they are."""
        self.networks.recalibrate(self.calibration(0))
        scene = self.held_out_scene()
        video = self.generate(scene)
        clips, noise = self.scored(scene, video, torch.Generator().manual_seed(EVALUATION_SEED))
        with self.autocast():
            velocity = self.scorer.velocity(self.networks.real(), scene.story.embeddings, clips, noise)
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

    def calibration(self, step: int) -> Callable[[nn.Module], None]:
        """A rollout that depends on the seed and `step` only, for ModelOpt to measure amax on."""

        def run(dit: nn.Module) -> None:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
            index = torch.randint(len(self.train), (min(self.options.batch, 8),), generator=generator)
            last = self.options.student_steps - 1
            scene = self.scene_of(self.train, index, max(self.options.chunks), last, generator)
            with torch.no_grad(), self.autocast():
                self.rollout(dit, scene.story, last)  # type: ignore[arg-type]

        return run

    def on_step(self, step: int) -> None:
        """Calibrate again every `recalibrate` steps, under NVFP4."""
        if step % self.options.recalibrate == 0:
            self.networks.recalibrate(self.calibration(step))

    def metadata(self) -> dict[str, dict[str, Any]]:
        """What the student is, and how it is sampled: its steps, without guidance."""
        options = self.options
        student = self.networks.student()
        amax = read_amax(insert_quantizers(student, self.calibration(0), rules=options.rules))
        numerics = {"nvfp4": {**options.rules.as_json(), "gradient": None}} if options.precision == "nvfp4" else {}
        return {
            "dit": {
                "sampling": {"steps": options.student_steps, "guidance": 1.0, "shift": self.preset.sampling.shift},
                "data": options.data,
                "chunks": list(options.chunks),
                "batch": options.batch,
                "context": "window",
                "i2v": float(options.i2v),
                "vae_sha256": self.vae_digest,
                "precision": options.precision,
                **numerics,
                "amax": amax,
                "distillation": {
                    "method": "dmd",
                    "teacher_sha256": self.teacher_facts["sha256"],
                    "guidance": options.guidance,
                    "critic_updates": options.ratio,
                    "cache": options.cache,
                    "score_context": options.score_context,
                    "lora": {"rank": options.lora_rank, "alpha": options.lora_alpha or options.lora_rank}
                    if options.lora_rank
                    else None,
                },
            }
        }


def cuts_of(clips: Clips) -> list[list[bool]]:
    """Which chunks begin a shot, [B][N]: those at which the offset of the positions grows."""
    assert clips.offsets is not None
    grown = clips.offsets.diff(dim=1, prepend=clips.offsets[:, :1]) > 0
    return grown.tolist()  # type: ignore[no-any-return]
