"""Stage "dit" on many ranks: the same batches and noise as on one, of which each rank computes its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from longtake.errors import LongtakeError
from longtake.training.models.quantize import insert_quantizers, plain_state, read_amax
from longtake.training.models.text.pretrained import PretrainedText
from longtake.training.models.text.words import text_encoder_for
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.objective.accumulate import rows_of
from longtake.training.objective.flex import flex_attention_for
from longtake.training.objective.graphed import Losses
from longtake.training.objective.teacher_forcing import Clips, Noise
from longtake.training.parallel.forcing import attention, part_loss, part_of, part_velocity, whole_velocity
from longtake.training.parallel.halo import encode_together
from longtake.training.parallel.layout import Layout
from longtake.training.parallel.ranks import Ranks
from longtake.training.parallel.sharding import require_heads, shard, shard_dit, whole
from longtake.training.stages.dit import DiTStage
from longtake.training.stages.flat_batch import batch_of_tensors
from longtake.training.stages.options import StageOptions
from longtake.training.stages.precompute import Stories
from longtake.training.stages.transformer import CALIBRATION_BATCHES
from longtake.training.stages.validation import one_step_video


class ParallelDiTStage(DiTStage):
    """See `stages.base.Stage`. A batch is that of one rank, dealt out to the sequence groups."""

    def __init__(self, options: StageOptions, ranks: Ranks, mode: str) -> None:
        """Raise LongtakeError before anything is made where the ranks don't fit the model or the batch."""
        require_heads(options.preset, ranks.sequence)
        for chunks in options.chunks:
            Layout(mode, chunks, ranks.sequence)
        if options.batch < ranks.groups:
            raise LongtakeError(
                "the batch is smaller than the number of sequence groups that share it",
                got=f"--batch {options.batch}, {ranks.groups} groups of {ranks.sequence} ranks",
                expected=f"at least {ranks.groups}",
                fix=f"--batch {ranks.groups}, or a larger --sequence-parallel",
            )
        super().__init__(replace(options, graph=False))
        self.ranks, self.mode, self.sharded = ranks, mode, False
        if self.recycling:  # every rank has the whole batch's errors already
            self.recycling.record = partial(self.recycling.record, gather=lambda errors: errors)  # type: ignore[method-assign]

    def prepare(self, device: torch.device) -> None:
        """As on one rank, then shard the weights."""
        super().prepare(device)
        bf16 = self.options.computes_in_bf16(device)
        shard_dit(self.dit, self.ranks, bf16)
        if isinstance(self.text, nn.Module):
            shard(self.text, self.ranks)
        self.sharded = True

    def cache(self, split: str, stories: int, seed: int) -> Stories:
        """Encoded stories; the ranks encode a clip together, each its window."""
        if self.ranks.mesh is not None:
            self.vae.encode = partial(encode_together, self.vae, group=torch.distributed.group.WORLD)  # type: ignore[method-assign]
        return super().cache(split, stories, seed)

    def tensor_loss(self, latents: Tensor, tokens: Tensor, history: Tensor, offsets: Tensor, *noise: Tensor) -> Losses:
        """Losses of the whole batch, of which this rank computes its part; the velocity if errors are recycled."""
        batch = batch_of_tensors((latents, tokens, history, offsets, *noise), self.extras, tokens.shape[1])
        rows = torch.arange(len(latents), device=latents.device).tensor_split(self.ranks.groups)[self.ranks.my_group]
        clips, drawn = rows_of(batch[0], rows), rows_of(batch[1], rows)
        velocity, layout = self.own_velocity(clips, drawn)
        losses = part_loss(velocity, clips, drawn, layout, self.ranks, self.preset.chunk_latents)
        if not self.recycling:
            return losses
        together = torch.zeros_like(latents)
        own = whole_velocity(velocity, layout, self.ranks, self.preset.chunk_latents)
        if self.ranks.place == 0:
            together[rows] = own
        return (*losses, self.ranks.total(together))

    def own_velocity(self, clips: Clips, noise: Noise) -> tuple[Tensor, Layout]:
        """Velocity of this rank's noisy blocks."""
        tokens, order = self.preset.chunk_tokens, Layout(self.mode, clips.chunks, self.ranks.sequence)
        part = part_of(clips, noise, order, self.ranks.place, self.preset.chunk_latents)
        flex = self.options.attention == "flex"  # otherwise block by block, by the fastest kernel there is
        attend = attention(
            order,
            clips.history,
            self.ranks.group,
            complete=self.options.precision != "bf16",
            whole=flex_attention_for(clips.history, clips.chunks, tokens, order.order) if flex else None,
        )
        with self.autocast():
            return part_velocity(self.dit, self.preset, self.embed, part, attend), order

    def state(self) -> dict[str, Tensor]:
        """The error buffers, the same on every rank; the first one saves them."""
        return super().state() if self.ranks.first else {}

    def velocity(self, clips: Clips, noise: Noise) -> Tensor:
        """Of all blocks, on every rank, for evaluation and calibration (no gradient once the weights are sharded)."""
        if not self.sharded:
            return super().velocity(clips, noise)
        velocity, layout = self.own_velocity(clips, noise)
        return whole_velocity(velocity, layout, self.ranks, self.preset.chunk_latents)

    def calibrated_amax(self) -> dict[str, dict[str, float]]:
        """Measured on whole weights by every rank alike, so it is what one rank would find.

        ModelOpt takes the largest amax of all ranks, which therefore all have to calibrate.
        """
        own = self.dit, self.text, self.sharded
        self.dit, self.text = self.whole_models()  # type: ignore[assignment]
        self.sharded = False
        try:
            calibrate = self.calibration(0, CALIBRATION_BATCHES)
            return read_amax(insert_quantizers(self.dit, calibrate, rules=self.options.rules))
        finally:
            self.dit, self.text, self.sharded = own

    def whole_models(self) -> tuple[CausalDiT, nn.Module]:
        """Unsharded copies of both models, on every rank. All must call."""
        text: Callable[[], nn.Module] = partial(text_encoder_for, self.preset, self.text.vocabulary)
        if isinstance(self.text, PretrainedText):
            text = partial(PretrainedText, self.preset.text, self.text.tokenizer_folder)
        copies = list[nn.Module]()
        for module, make in ((self.dit, partial(CausalDiT, self.preset.dit)), (self.text, text)):
            gathered = {name: whole(value.detach()) for name, value in plain_state(module).items()}
            with torch.device("meta"):
                copies.append(make())
            copies[-1].load_state_dict(gathered, assign=True)
        return copies[0], copies[1]  # type: ignore[return-value]

    def on_step(self, step: int) -> None:
        """As on one rank; amax is then the largest that any rank found."""
        with self.unsharded():
            super().on_step(step)

    def evaluate(self) -> dict[str, float]:
        with self.unsharded():
            return super().evaluate()

    def samples(self) -> Tensor | None:
        """In one step, by passes that all ranks make together; GPU only."""
        if self.device.type != "cuda":
            return None
        return one_step_video(self.velocity, self.vae, self.held_out, self.options, self.device)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Whole weights on every rank while quantizers are calibrated; nothing to do in bf16."""
        if self.options.precision != "nvfp4":
            yield
            return
        sharded = [m for m in self.dit.modules() if isinstance(m, FSDPModule)]
        for module in sharded:
            module.unshard()
        yield
        for module in sharded:
            module.reshard()
