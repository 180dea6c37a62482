"""Stage "distill": DMD of a teacher-forced DiT to a student of a few steps (see `stages.base.Stage`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longtake.runtime.sampler import model_timesteps
from longtake.training.accumulate import parts_of, rows_of
from longtake.training.checkpoint import load_into
from longtake.training.data.base import dataset_from_name
from longtake.training.distill.networks import Networks
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.rollout import Rollout, Story
from longtake.training.distill.scores import Scorer, critic_loss, dmd_gradient, dmd_loss, draw_levels
from longtake.training.dit import CausalDiT
from longtake.training.embedding_cache import CachedText, embeddings_from_cache
from longtake.training.latent_cache import LatentCache, cache_from_dataset, frozen_vae, vae_checkpoint
from longtake.training.networks import load_meta
from longtake.training.quantize import insert_quantizers, read_amax
from longtake.training.stages.base import Metric
from longtake.training.stored_stories import StoredStories, stored_from_dataset
from longtake.training.teacher_forcing import Clips, Noise
from longtake.training.text_encoder import text_encoder_for

HELD_OUT = 16
LossOf = Callable[["Scene", Noise], tuple[Tensor, dict[str, Metric]]]
EVALUATION_SEED = 20_000_003


@dataclass(frozen=True)
class Scene:
    """A batch to distil on. clips: of the data, whose latents matter for given frames only. story: what is generated."""

    clips: Clips
    story: Story
    exit_step: int

    def part(self, rows: slice) -> Scene:
        """Some of its stories."""
        story = self.story
        first = None if story.first is None else story.first[rows]
        own = Story(story.embeddings[rows], story.cuts[rows], story.noise[rows], first)
        return Scene(rows_of(self.clips, rows), own, self.exit_step)


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
        self.text_digest = load_into(self.text, text_file, kind="text_encoder", preset=preset.name)["sha256"]
        self.cached_text: CachedText | None = None
        self.teacher_facts = load_into(self.teacher, folder / "dit.safetensors", kind="dit", preset=preset.name)
        self.modules: dict[str, nn.Module] = {}
        self.critic_modules: dict[str, nn.Module] = {}
        self.rollout = Rollout(preset, options.student_steps, options.cache)
        self.scorer = Scorer(preset, options.score_context)

    def prepare(self, device: torch.device) -> None:
        """Load the stories; quantizers and adapters; no text encoder is trained."""
        self.device = device
        self.device_generator = torch.Generator(device)
        self.text.requires_grad_(False).eval()
        self.vae, self.vae_digest = frozen_vae(self.companions[0], self.preset, device)
        self.train = self.stories("train", self.options.stories, self.options.seed)
        self.held_out = self.stories("eval", min(HELD_OUT, self.options.stories), EVALUATION_SEED)
        self.cuts = {id(stories): cuts_of(stories.offsets) for stories in (self.train, self.held_out)}
        nothing = self.text.tokenize([self.preset.negative_prompt]).to(device)
        self.cached_text = self.cache_text(nothing)
        if self.cached_text is None:
            self.text.to(device)
        with torch.no_grad(), self.autocast():
            self.nothing = self.embed(nothing)[0]
        self.networks = Networks(self.teacher, self.options, device)
        self.networks.prepare(self.calibration(0))
        generator, fake = self.networks.trained()
        self.modules, self.critic_modules = {"dit": generator}, {"fake_score": fake}

    def stories(self, split: str, count: int, seed: int) -> LatentCache | StoredStories:
        """Encoded stories of a split of the data set, in memory or on disk."""
        options = self.options
        dataset = dataset_from_name(options.data, self.preset, split)
        same: dict[str, Any] = {
            "stories": count, "chunks": max(options.chunks), "context": "window", "seed": seed, "what": f"{split} stories",
        }  # fmt: skip
        if options.cache_dir is None:
            return cache_from_dataset(dataset, self.vae, self.text, self.preset, **same)
        where: dict[str, Any] = {"cache_dir": options.cache_dir, "workers": options.workers}
        return stored_from_dataset(dataset, self.vae, self.vae_digest, self.text, self.preset, **where, **same)

    def cache_text(self, nothing: Tensor) -> CachedText | None:
        """Embeddings of all prompts and of `nothing` on disk, where there is a folder for them."""
        if self.options.cache_dir is None:
            return None
        told = [stories.tokens.flatten(0, 1).cpu() for stories in (self.train, self.held_out)]
        return embeddings_from_cache(
            self.text, self.text_digest, torch.cat((*told, nothing.cpu())), self.preset,
            cache_dir=self.options.cache_dir, device=self.device, autocast=self.autocast,
            bf16=self.options.computes_in_bf16(self.device),
        )  # fmt: skip

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int32 [P, E] -> fp32 embeddings [P, E, dim], computed or from the cache."""
        return (self.cached_text or self.text)(tokens)  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[None]:
        # No cache: a weight cast under no_grad must not serve a pass that wants a gradient.
        enabled = self.options.computes_in_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    # ---- batches -------------------------------------------------------------------------------------------------

    def scene(self, generator: torch.Generator) -> Scene:
        """Random prompts and cuts of one length, noise, and one exit step for all of them."""
        choices = self.options.chunks
        chunks = choices[int(torch.randint(len(choices), (), generator=generator))]
        batch = self.options.accumulate * self.options.batch
        index = torch.randint(len(self.train), (batch,), generator=generator)
        exit_step = int(torch.randint(self.options.student_steps, (), generator=generator))
        self.device_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return self.scene_of(self.train, index, chunks, exit_step, self.device_generator)

    def scene_of(
        self,
        stories: LatentCache | StoredStories,
        index: Tensor,
        chunks: int,
        exit_step: int,
        generator: torch.Generator,
    ) -> Scene:
        """These stories' prompts and cuts, with noise of `generator`; `index` is on the host."""
        in_memory = isinstance(stories, LatentCache)
        clips = stories.clips(index.to(self.device, non_blocking=True) if in_memory else index, chunks)
        cuts = [self.cuts[id(stories)][i][:chunks] for i in index.tolist()]
        given = torch.zeros(clips.latents.shape[:2], dtype=torch.bool, device=self.device)
        given[:, 0] = True
        clips = replace(clips, given=given if self.options.i2v else None)
        with torch.no_grad(), self.autocast():
            embeddings = self.embed(clips.tokens.flatten(0, 1)).unflatten(0, clips.tokens.shape[:2])
        noise = torch.randn(clips.latents.shape, generator=generator, device=generator.device).to(self.device)
        first = clips.latents[:, 0] if self.options.i2v else None
        return Scene(clips, Story(embeddings, cuts, noise, first), exit_step)

    def generate(self, scene: Scene, gradient: bool = False) -> Tensor:
        """The student's video, fp32 [B, F, C, H, W]."""
        with self.autocast():
            return self.rollout(self.networks.generator(), scene.story, scene.exit_step, gradient)

    def score_noise(self, scene: Scene, generator: torch.Generator) -> Noise:
        """What the scores see a scene's videos under."""
        per_block = self.options.i2v or self.options.score_context == "clean"
        like, shift = scene.story.noise, self.preset.sampling.shift
        levels = draw_levels((len(like), scene.clips.chunks), shift, generator, per_block).to(self.device)
        return Noise(torch.randn(like.shape, generator=generator, device=generator.device).to(self.device), levels)

    # ---- losses --------------------------------------------------------------------------------------------------

    def generator_losses(self, scene: Scene) -> Iterator[tuple[Tensor, dict[str, Metric]]]:
        """`generator_loss` of a scene, in parts that add up to it."""
        return self.in_parts(self.generator_loss, scene)

    def critic_losses(self, scene: Scene) -> Iterator[tuple[Tensor, dict[str, Metric]]]:
        """`critic_loss` of a scene, in parts that add up to it."""
        return self.in_parts(self.critic_loss, scene)

    def in_parts(self, loss_of: LossOf, scene: Scene) -> Iterator[tuple[Tensor, dict[str, Metric]]]:
        """A part's backward pass comes before the next part is asked for."""
        parts, noise = self.options.accumulate, self.score_noise(scene, self.device_generator)
        for number, (clips, drawn, share) in enumerate(parts_of(scene.clips, noise, parts)):
            size = len(clips.latents)
            loss, metrics = loss_of(scene.part(slice(number * size, (number + 1) * size)), drawn)
            yield loss * share, {name: value / parts for name, value in metrics.items()}

    def generator_loss(self, scene: Scene, noise: Noise) -> tuple[Tensor, dict[str, Metric]]:
        """DMD's loss on the student's own video."""
        video = self.generate(scene, gradient=True)
        clips, text = replace(scene.clips, latents=video.detach()), scene.story.embeddings
        with torch.no_grad(), self.autocast():
            real = self.scorer.guided_x0(self.networks.real(), text, self.nothing, clips, noise, self.options.guidance)
            fake = self.scorer.x0(self.networks.fake(), text, clips, noise)
        gradient = dmd_gradient(clips.latents, real, fake, clips.chunks, clips.counted)
        self.networks.generator()  # the backward pass is this one's
        return dmd_loss(video, gradient, clips.counted).float(), {"dmd_gradient": gradient.abs().mean()}

    def critic_loss(self, scene: Scene, noise: Noise) -> tuple[Tensor, dict[str, Metric]]:
        """The fake score's flow loss on the student's video."""
        clips = replace(scene.clips, latents=self.generate(scene))
        with self.autocast():
            velocity = self.scorer.velocity(self.networks.fake(), scene.story.embeddings, clips, noise)
        return critic_loss(velocity, clips, noise), {}

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Metric]]:
        """The critic's, of a batch of its own; the trainer of this stage takes both losses apart."""
        scene = self.scene(generator)
        return self.critic_loss(scene, self.score_noise(scene, self.device_generator))

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
        noise = self.score_noise(scene, torch.Generator().manual_seed(EVALUATION_SEED))
        clips = replace(scene.clips, latents=video)
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
                "sampling": sampling_facts(options.student_steps, self.preset.sampling.shift),
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


def cuts_of(offsets: Tensor | None) -> list[list[bool]]:
    """Which chunks begin a shot, [S][N]: those at which the offset [S, N] of the positions grows."""
    assert offsets is not None
    return (offsets.diff(dim=1, prepend=offsets[:, :1]) > 0).tolist()  # type: ignore[no-any-return]


def sampling_facts(steps: int, shift: float) -> dict[str, Any]:
    """How a student is sampled, for its side file: what exports record and `generate` and `check` follow."""
    return {"steps": steps, "guidance": 1.0, "shift": shift, "timesteps": list(model_timesteps(steps, shift))}
