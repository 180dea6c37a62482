"""Stage "dit": the causal DiT and the text encoder, trained together by teacher forcing, in bf16 or under NVFP4."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.data.base import told
from longtake.training.data.embedding_cache import CachedText
from longtake.training.data.latent_cache import frozen_vae, vae_mismatch
from longtake.training.models.quantize import insert_quantizers
from longtake.training.models.wan.dit import Attend
from longtake.training.objective.accumulate import own_gradients, parts_of
from longtake.training.objective.error_recycling import ErrorRecycling
from longtake.training.objective.flex import chosen, flex_attention_for
from longtake.training.objective.gradient_quant import quantize_gradients
from longtake.training.objective.graphed import GraphedLoss, Losses
from longtake.training.objective.teacher_forcing import Clips, Noise, draw_noise, flow_loss, predict_velocity
from longtake.training.stages.base import Loss
from longtake.training.stages.batches import BatchSampler
from longtake.training.stages.conditioning import drop_text, give_pictures
from longtake.training.stages.flat_batch import batch_of_tensors, extras_of, tensors_of
from longtake.training.stages.initial_models import leave_tokenizer
from longtake.training.stages.options import StageOptions
from longtake.training.stages.precompute import Stories, embeddings_of, stories_of
from longtake.training.stages.transformer import TransformerStage
from longtake.training.stages.validation import EVALUATION_SEED, sampled_video

HELD_OUT = 32
SAMPLED = 2  # chunks that are shown

logger = logging.getLogger(__name__)


class DiTStage(TransformerStage):
    """See `stages.base.Stage`."""

    def __init__(self, options: StageOptions) -> None:
        folders = {name: getattr(options, name) for name in ("max_chunks_per_shot", "max_bad_share")}
        self.clips, self.held_out_clips = (options.dataset(split, **folders) for split in ("train", "eval"))
        self.line = told(self.clips, self.held_out_clips, chunks=max(options.chunks))
        super().__init__(options, self.clips.captions)
        self.cached_text: CachedText | None = None
        shift, recycling = self.preset.sampling.shift, options.recycling
        self.recycling = ErrorRecycling(recycling, shift) if recycling else None
        self.extras: tuple[str, ...] = ()

    def batch_name(self) -> object:
        """What the latest batch is called."""
        return self.batches.batch_name

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
        self.check_vae()
        self.train = self.cache("train", self.options.stories, self.options.seed)
        self.held_out = self.cache("eval", min(HELD_OUT, self.options.stories), EVALUATION_SEED)
        self.batches = BatchSampler(self.train, self.options, device)
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

    def check_vae(self) -> None:
        """Raise LongtakeError if --init was made with another VAE and nobody asked for this one; else warn."""
        start, other = self.options.init, None
        if start is not None:
            other = vae_mismatch(start, self.companions[0], self.vae_digest)
        if other is not None and self.options.vae is None:
            raise other
        if other is not None:
            logger.warning("%s (%s); it is taken, for --vae asks for it", other.what, other.got)

    def cache(self, split: str, stories: int, seed: int) -> Stories:
        """Encoded stories of a split of the data set."""
        return stories_of(self, split, stories, seed, max(self.options.chunks), self.options.context)

    def cache_text(self) -> CachedText | None:
        """Every prompt's embedding on disk, where the encoder is frozen and there is a folder for it."""
        return None if self.options.trains_text else embeddings_of(self)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int32 [P, E] -> fp32 embeddings [P, E, dim], computed or from the cache."""
        return (self.cached_text or self.text)(tokens)  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[None]:
        enabled = self.options.computes_in_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)  # for capture

    def losses(self, step: int, generator: torch.Generator) -> Iterator[Loss]:
        """Weighted flow loss of one random batch, in parts that add up to it (see `stages.base.Stage`)."""
        clips = self.batches.next(generator)
        self.device_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        clips = drop_text(clips, self.options.text_dropout, self.device_generator)
        clips = give_pictures(clips, self.options.i2v, self.device_generator)
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

    def tensor_loss(self, latents: Tensor, tokens: Tensor, history: Tensor, offsets: Tensor, *noise: Tensor) -> Losses:
        """Weighted and plain flow loss of what `tensors_of` gives, and the velocity if errors are recycled."""
        unmasked = self.train.unmasked(tokens.shape[1])
        clips, drawn = batch_of_tensors((latents, tokens, history, offsets, *noise), self.extras, unmasked)
        velocity = self.velocity(clips, drawn)
        losses = flow_loss(velocity, clips, drawn)
        return (*losses, velocity) if self.recycling else losses

    def position(self) -> dict[str, Any]:
        """The place in the data, for resume points; and which encoder cached embeddings are of."""
        place = {**self.batches.position(), "words": len(self.text.vocabulary)}
        return {**place, "text_sha256": self.text_digest} if self.cached_text else place

    def require_position(self, position: dict[str, Any]) -> None:
        """Raise LongtakeError if the captions are no longer those whose words the run began with."""
        if position.get("words", len(self.text.vocabulary)) != len(self.text.vocabulary):
            what, got = "the run to resume had other captions", f"{len(self.text.vocabulary)} words known now"
            expected, fix = f"{position['words']}", "put the captions back, or start anew with --init and another --out"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from there."""
        if self.cached_text and position.get("text_sha256", self.text_digest) != self.text_digest:
            what = "the run to resume had another text encoder"
            got, expected = f"sha256 {self.text_digest[:16]}…", f"sha256 {position['text_sha256'][:16]}…"
            raise IntegrityError(what, got=got, expected=expected, fix="pass the --init that it began with")
        self.batches.seek(position)

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

    def look(self, generator: torch.Generator) -> None:
        clips = self.batches.random(generator)
        self.velocity(clips, draw_noise(clips, self.preset.sampling.shift, generator))

    def held_out_flow(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        clips = self.held_out.clips(index, max(self.options.chunks))
        noise = draw_noise(clips, self.preset.sampling.shift, generator)
        return flow_loss(self.velocity(clips, noise), clips, noise)

    def samples(self) -> Tensor | None:
        """A held-out story, and under it what the model makes of its prompts, sampled as it will be; one chunk on a CPU."""
        chunks = min(SAMPLED if self.device.type == "cuda" else 1, max(self.options.chunks))
        with self.autocast():
            return sampled_video(self.dit, self.embed, self.vae, self.held_out, chunks)

    def leave(self, out: Path) -> None:
        """The tokenizer of a text encoder that has one in a file."""
        leave_tokenizer(self.text, out)


def learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
