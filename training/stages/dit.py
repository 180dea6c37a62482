"""Stage "dit": the causal DiT and the text encoder, trained together by teacher forcing, in bf16 or under NVFP4."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longtake.runtime.errors import IntegrityError
from longtake.training.accumulate import own_gradients, parts_of
from longtake.training.checkpoint import load_into
from longtake.training.data.base import dataset_from_name
from longtake.training.dit import Attend, CausalDiT
from longtake.training.embedding_cache import CachedText, digest_of_state, embeddings_from_cache
from longtake.training.error_recycling import ErrorRecycling
from longtake.training.flex import chosen, flex_attention_for
from longtake.training.gradient_quant import quantize_gradients
from longtake.training.graphed import GraphedLoss, Losses
from longtake.training.latent_cache import LatentCache, cache_from_dataset, frozen_vae, vae_checkpoint
from longtake.training.networks import load_meta
from longtake.training.quantize import insert_quantizers, read_amax, recalibrate
from longtake.training.stages.base import Metric, StageOptions
from longtake.training.stored_stories import StoredStories, stored_from_dataset
from longtake.training.teacher_forcing import Clips, Noise, draw_noise, flow_loss, predict_velocity
from longtake.training.text_encoder import AnyTextEncoder, text_encoder_for

HELD_OUT = 32
EVALUATION_SEED = 20_000_003
CALIBRATION_BATCHES = 4
OF_CLIPS, OF_NOISE = ("given", "valid"), ("start", "context")  # what a batch may have besides the rest

logger = logging.getLogger(__name__)


class DiTStage:
    """See `stages.base.Stage`."""

    name = "dit"

    def __init__(self, options: StageOptions) -> None:
        self.options, self.preset = options, options.preset
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.dit, self.text = self.initial_models()
        self.text.requires_grad_(options.trains_text)
        self.cached_text: CachedText | None = None
        self.companions = [vae_checkpoint(self.preset, options.vae)]
        self.modules: dict[str, nn.Module] = {"dit": self.dit, "text_encoder": self.text}
        shift, recycling = self.preset.sampling.shift, options.recycling
        self.recycling = ErrorRecycling(recycling, shift) if recycling else None
        self.extras: tuple[str, ...] = ()
        self.batch_name: object = ""

    def initial_models(self) -> tuple[CausalDiT, AnyTextEncoder]:
        """Random models, or those of --init."""
        preset, folder = self.preset, self.options.init
        if folder is None:
            dit, text = CausalDiT(preset.dit), text_encoder_for(preset)
            cached = self.options.cache_dir is not None and not self.options.trains_text
            self.text_digest = digest_of_state(text) if cached else ""
            return dit, text
        text_file, dit_file = folder / "text_encoder.safetensors", folder / "dit.safetensors"
        text = text_encoder_for(preset, load_meta(text_file, "text_encoder", preset).get("vocabulary"), folder)
        dit = CausalDiT(preset.dit)
        self.text_digest = load_into(text, text_file, kind="text_encoder", preset=preset.name)["sha256"]
        load_into(dit, dit_file, kind="dit", preset=preset.name)
        return dit, text

    def prepare(self, device: torch.device) -> None:
        """Encode the stories; insert quantizers when training under NVFP4."""
        self.device = device
        self.device_generator = torch.Generator(device)
        tokens = self.preset.chunk_tokens
        flex = chosen(self.options.attention, device, max(self.options.chunks), tokens)  # long: launches don't matter
        graph = self.options.graph and device.type == "cuda" and not flex
        self.dit.to(device)
        self.dit.checkpointing = self.options.gradient_checkpointing
        if self.recycling:
            chunk = (self.preset.chunk_latents, self.preset.dit.channels, *self.preset.latent_hw)
            size = self.recycling.bytes_at_most(chunk) / 1e9
            logger.info("error buffers take up to %.3g GB of memory, and of each resume point", size)
        self.vae, self.vae_digest = frozen_vae(self.companions[0], self.preset, device)
        self.train = self.cache("train", self.options.stories, self.options.seed)
        self.held_out = self.cache("eval", min(HELD_OUT, self.options.stories), EVALUATION_SEED)
        self.cached_text = self.cache_text()
        if self.cached_text is None:
            self.text.to(device)
        captured = self.cached_text is None or self.cached_text.resident  # a capture can't read from disk
        learn = {name: module for name, module in self.modules.items() if learns(module)}
        self.graphed = GraphedLoss(learn, self.tensor_loss, graph and captured)
        if self.options.precision == "nvfp4":
            insert_quantizers(self.dit, self.calibration(0), rules=self.options.rules)
        if self.options.quantize_gradients:
            quantize_gradients(self.dit, self.options.rules)

    def cache(self, split: str, stories: int, seed: int) -> LatentCache | StoredStories:
        """Encoded stories of a split of the data set, in memory or on disk."""
        options = self.options
        dataset = dataset_from_name(
            options.data, self.preset, split, options.max_chunks_per_shot, options.max_bad_share
        )
        same = {
            "stories": stories,
            "chunks": max(options.chunks),
            "context": options.context,
            "seed": seed,
            "what": f"{split} stories",
        }
        if options.cache_dir is None:
            return cache_from_dataset(dataset, self.vae, self.text, self.preset, **same)  # type: ignore[arg-type]
        return stored_from_dataset(
            dataset,
            self.vae,
            self.vae_digest,
            self.text,
            self.preset,
            cache_dir=options.cache_dir,
            workers=options.workers,
            **same,  # type: ignore[arg-type]
        )

    def cache_text(self) -> CachedText | None:
        """Every prompt's embedding on disk, where the encoder is frozen and there is a folder for it."""
        if self.options.cache_dir is None or self.options.trains_text:
            return None
        tokens = torch.cat([stories.tokens.flatten(0, 1).cpu() for stories in (self.train, self.held_out)])
        return embeddings_from_cache(
            self.text, self.text_digest, tokens, self.preset,
            cache_dir=self.options.cache_dir, device=self.device, autocast=self.autocast,
            bf16=self.options.computes_in_bf16(self.device),
        )  # fmt: skip

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int32 [P, E] -> fp32 embeddings [P, E, dim], computed or from the cache."""
        return (self.cached_text or self.text)(tokens)  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[None]:
        enabled = self.options.computes_in_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)  # for capture

    def losses(self, step: int, generator: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Metric]]]:
        """Weighted flow loss of one random batch, in parts that add up to it (see `stages.base.Stage`)."""
        clips = self.next_batch(generator)
        self.device_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        clips = self.give_pictures(self.drop_text(clips))
        weighting = self.options.loss_weighting
        noise = draw_noise(clips, self.preset.sampling.shift, self.device_generator, weighting)
        if self.recycling:
            noise = self.recycling.inject(clips, noise, step, generator)
        if self.options.quantize_gradients:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # of the stochastic rounding
        self.extras = extras_of(clips, noise)
        if self.options.accumulate > 1 and self.graphed.enabled:
            own_gradients(self.modules)
        velocities = []
        for part, drawn, share in parts_of(clips, noise, self.options.accumulate):
            weighted, plain, *velocity = self.graphed(*tensors_of(part, drawn))
            velocities += [x.detach().clone() for x in velocity]
            # Products, so new tensors: those of a CUDA graph are written over by its next run.
            yield weighted * share, {"flow": plain.detach() * share}
        if self.recycling:
            self.recycling.record(clips, noise, torch.cat(velocities), step, generator)

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Metric]]:
        """The batch's loss, all parts together."""
        found = list(self.losses(step, generator))
        return torch.stack([loss for loss, _ in found]).sum(), {"flow": sum(metrics["flow"] for _, metrics in found)}

    def tensor_loss(self, latents: Tensor, tokens: Tensor, history: Tensor, offsets: Tensor, *noise: Tensor) -> Losses:
        """Weighted and plain flow loss of what `tensors_of` gives, and the velocity if errors are recycled."""
        unmasked = self.train.unmasked(tokens.shape[1])
        more = dict(zip(self.extras, noise[2:]))
        clips = Clips(latents, tokens, history, unmasked, offsets, *(more.get(name) for name in OF_CLIPS))
        drawn = Noise(noise[0], noise[1], *(more.get(name) for name in OF_NOISE))
        velocity = self.velocity(clips, drawn)
        losses = flow_loss(velocity, clips, drawn)
        return (*losses, velocity) if self.recycling else losses

    def batch_shape(self, generator: torch.Generator) -> tuple[int, int]:
        """How many stories, all cut to how many chunks: a random length; the shorter, the more of them."""
        choices = self.options.chunks
        chunks = choices[int(torch.randint(len(choices), (), generator=generator))]
        return self.options.batch * max(choices) // chunks, chunks

    def batch(self, generator: torch.Generator, parts: int = 1) -> Clips:
        """Random stories of one length, so many times as many."""
        size, chunks = self.batch_shape(generator)
        index = torch.randint(len(self.train), (parts * size,), generator=generator)
        self.batch_name = StoryNames(index)
        return self.train.clips(index.to(self.device, non_blocking=True), chunks)

    def next_batch(self, generator: torch.Generator) -> Clips:
        """What the next step trains on: the next stories in order where they are on disk, else random ones."""
        if isinstance(self.train, LatentCache):
            return self.batch(generator, self.options.accumulate)
        size, chunks = self.batch_shape(generator)
        clips = self.train.take(self.options.accumulate * size, chunks)
        self.batch_name = self.train.batch_name
        return clips

    def position(self) -> dict[str, Any]:
        """The place in the data, for resume points; and which encoder cached embeddings are of."""
        place = {} if isinstance(self.train, LatentCache) else self.train.position()
        return {**place, "text_sha256": self.text_digest} if self.cached_text else place

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from there."""
        if self.cached_text and position.get("text_sha256", self.text_digest) != self.text_digest:
            raise IntegrityError(
                "the run to resume had another text encoder", got=f"sha256 {self.text_digest[:16]}…",
                expected=f"sha256 {position['text_sha256'][:16]}…", fix="pass the --init that it began with",
            )  # fmt: skip
        if not isinstance(self.train, LatentCache):
            self.train.seek(position)

    def drop_text(self, clips: Clips) -> Clips:
        """Empty all prompts of some samples, so that the model also learns to go without (for CFG)."""
        keep = torch.rand(len(clips.tokens), 1, 1, generator=self.device_generator, device=self.device)
        tokens = clips.tokens * (keep >= self.options.text_dropout)
        return replace(clips, tokens=tokens)

    def give_pictures(self, clips: Clips) -> Clips:
        """Give the first frame of some samples (image to video)."""
        if not self.options.i2v:
            return clips
        drawn = torch.rand(len(clips.tokens), generator=self.device_generator, device=self.device)
        given = torch.zeros(clips.latents.shape[:2], dtype=torch.bool, device=self.device)
        given[:, 0] = drawn < self.options.i2v
        return replace(clips, given=given)

    def velocity(self, clips: Clips, noise: Noise) -> Tensor:
        with self.autocast():
            embeddings = self.embed(clips.tokens.flatten(0, 1)).unflatten(0, clips.tokens.shape[:2])
            return predict_velocity(self.dit, self.preset, embeddings, clips, noise, self.attention(clips))

    def attention(self, clips: Clips) -> Attend | None:
        """FlexAttention where it is chosen; None: block by block."""
        tokens = self.preset.chunk_tokens
        if chosen(self.options.attention, self.device, clips.chunks, tokens):
            return flex_attention_for(clips.history, clips.chunks, tokens)
        return None

    def state(self) -> dict[str, Tensor]:
        """The error buffers, for a resume point."""
        return self.recycling.state() if self.recycling else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        if self.recycling:
            self.recycling.load_state(state)

    def calibration(self, step: int, batches: int = 1) -> Callable[[nn.Module], None]:
        """A run over training batches that depends on the seed and `step` only, for ModelOpt to measure amax on."""

        def run(dit: nn.Module) -> None:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
            for _ in range(batches):
                clips = self.batch(generator)
                self.velocity(clips, draw_noise(clips, self.preset.sampling.shift, generator))

        return run

    def on_step(self, step: int) -> None:
        """Calibrate again every `recalibrate` steps, under NVFP4."""
        if self.options.precision == "nvfp4" and step % self.options.recalibrate == 0:
            recalibrate(self.dit, self.calibration(step))

    def evaluate(self) -> dict[str, float]:
        """Flow loss on held-out stories at fixed noise; under NVFP4 with amax of the present weights."""
        if self.options.precision == "nvfp4":
            recalibrate(self.dit, self.calibration(0, CALIBRATION_BATCHES))
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        size, totals = max(1, min(self.options.batch, 8)), torch.zeros(2)
        for index in torch.arange(len(self.held_out)).split(size):
            clips = self.held_out.clips(index.to(self.device), max(self.options.chunks))
            noise = draw_noise(clips, self.preset.sampling.shift, generator)
            with torch.no_grad():
                totals += torch.stack(flow_loss(self.velocity(clips, noise), clips, noise)).cpu() * len(index)
        loss, flow = (totals / len(self.held_out)).tolist()
        return {"loss": loss, "flow": flow}

    @torch.no_grad()
    def samples(self) -> Tensor | None:
        """A held-out story, and under it what the model makes of it in one step from 80 % noise; GPU only."""
        if self.device.type != "cuda":
            return None
        clips = self.held_out.clips(torch.zeros(1, dtype=torch.long, device=self.device), max(self.options.chunks))
        noise = draw_noise(clips, self.preset.sampling.shift, torch.Generator().manual_seed(EVALUATION_SEED))
        noise.levels[..., 0], noise.levels[..., 1] = 800.0, 0.8
        noisy = 0.2 * clips.latents + 0.8 * noise.eps
        guess = noisy - 0.8 * self.velocity(clips, noise)
        video = self.vae.decode(torch.cat((clips.latents, guess)))
        return ((video * 0.5 + 0.5) * 255).round().to(torch.uint8).transpose(1, 2)

    def metadata(self) -> dict[str, dict[str, Any]]:
        """Amax of the quantized linears (calibrated for the present weights), vocabulary, and what it was trained on."""
        options = self.options
        shared = {
            "data": options.data,
            "max_chunks_per_shot": options.max_chunks_per_shot,
            "stories": options.stories,
            "chunks": list(options.chunks),
            "batch": options.batch,
            "context": options.context,
            "text_dropout": options.text_dropout,
            "loss_weighting": options.loss_weighting,
            "i2v": options.i2v,
            "error_recycling": asdict(options.recycling) if options.recycling else None,
            "vae_sha256": self.vae_digest,
            "sampling": {"steps": self.preset.sampling.steps, "guidance": self.preset.sampling.guidance},
        }
        return {
            "dit": {**shared, "precision": options.precision, **self.numerics(), "amax": self.calibrated_amax()},
            "text_encoder": {**shared, "vocabulary": list(self.text.vocabulary)},
        }

    def numerics(self) -> dict[str, Any]:
        """How the DiT was quantized in training, which exports of it follow; nothing in bf16."""
        if self.options.precision != "nvfp4":
            return {}
        rules = self.options.rules
        gradient = {"rule": rules.gradient, "emulated": True} if self.options.quantize_gradients else None
        return {"nvfp4": {**rules.as_json(), "gradient": gradient}}

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


def learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@dataclass(frozen=True)
class StoryNames:
    """What a batch is called, should it be asked for."""

    index: Tensor

    def __str__(self) -> str:
        return f"stories {self.index.tolist()}"


def tensors_of(clips: Clips, noise: Noise) -> tuple[Tensor, ...]:
    """What varies from step to step: latents, tokens, history, offsets, eps, levels, and the rest by `extras_of`."""
    offsets = torch.zeros_like(clips.tokens[..., 0]) if clips.offsets is None else clips.offsets
    more = (getattr(noise if name in OF_NOISE else clips, name) for name in extras_of(clips, noise))
    return clips.latents, clips.tokens, clips.history, offsets, noise.eps, noise.levels, *more


def extras_of(clips: Clips, noise: Noise) -> tuple[str, ...]:
    """Names of what this batch has besides; a run's batches agree in it."""
    pairs = [(clips, name) for name in OF_CLIPS] + [(noise, name) for name in OF_NOISE]
    return tuple(name for owner, name in pairs if getattr(owner, name) is not None)


def stage_from_options(options: StageOptions) -> DiTStage:
    """The stage `longtake train --stage dit` runs."""
    return DiTStage(options)
