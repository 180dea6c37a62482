"""What a model looks at when a subject returns unnamed, and what not knowing its colour costs.

The past is the data set's own, teacher-forced through the runtime's slots; the chunks of the return are noised at a
student's levels. Of each: how much of the attention falls on the global sink, the shot sink, recent chunks and the chunk
itself, by layer; and the flow loss, with the colour left out of the prompt ("asked") and named in it ("told"). At the cut
only the global sink shows the colour, so there the difference of the two is what the model fails to read from it.

Legend: B stories, N chunks, L layers, R roles, K visible blocks, S noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longtake.plugins.pointwise import apply_rope
from longtake.training.data.digit_stories import Story
from longtake.training.data.held_out_stories import LAST
from longtake.training.experiment.batched import SINKS, Rollout, Sampling
from longtake.training.experiment.evaluate import Eyes, encoded, rounded
from longtake.training.experiment.stories import scripts_of
from longtake.training.models.load import Models
from longtake.training.models.sampler import UniPC, schedule_of
from longtake.training.models.wan.rope import rope_tables
from longtake.training.objective.chunk_pass import ChunkPass

ROLES = ("global sink", "shot sink", "recent", "own")
LEVELS = 4  # a 4-step student's
NEAR = 3  # chunks before the current one: where training on short stories has the shot sink
# The window's sinks, and how many chunks away the shot sink seems to stand; None: where it does.
CONDITIONS: dict[str, tuple[str, int | None]] = {
    **{name: (name, None) for name in SINKS},
    "both, shot sink near": ("both", NEAR),
}


class Weigher:
    """Attention that keeps how much of it falls on each block of keys: `masses`, [B, K] a call, so one a layer."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.masses: list[Tensor] = []

    def __call__(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        """See `scaled_dot_product_attention`."""
        logits = q_BHTD.float() @ k_BHTD.float().transpose(-1, -2) * q_BHTD.shape[-1] ** -0.5
        blocks = logits.softmax(-1).unflatten(-1, (-1, self.block_tokens)).sum(-1)
        self.masses.append(blocks.mean((1, 2)))
        return functional.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD)


class Probe(Rollout):
    """Rolls the data set's own stories through the slots; `look_at` measures a chunk before it is written."""

    def __init__(self, models: Models, stories: Sequence[Story], sampling: Sampling, eyes: Eyes, data: Tensor) -> None:
        """`data`: the stories' latents, fp32 [B, N F, C, h, w]."""
        super().__init__(models, scripts_of(stories, 0), sampling, eyes.device, given=data)
        self.plain = ChunkPass(models.dit, sampling.cache, self.slots.layers[0].dtype)
        self.weigher = Weigher(models.preset.chunk_tokens)
        self.plain.attention = self.weigher
        self.near: int | None = None  # turns the keys of the shot sink so that it seems to stand so many chunks away

    def fixed(self, chunk: int) -> tuple[Tensor, ...]:
        """See `Rollout.fixed`."""
        found = super().fixed(chunk)
        return found if self.near is None else self.nearer(found, chunk, self.near)

    def nearer(self, found: tuple[Tensor, ...], chunk: int, near: int) -> tuple[Tensor, ...]:
        """The same with the shot sink's keys turned by the rotary angle of the way that it is moved."""
        preset, layers = self.models.preset, len(self.models.dit.blocks)
        past = [kv.clone() for kv in found[2 + layers :]]
        seen = len(past) // layers
        for story, plans in enumerate(self.plans):
            bound, visible = plans[chunk - 1].after.shot if chunk else None, plans[chunk].visible[:-1]
            if not bound or bound not in visible:
                continue
            way = max(0, chunk - near - bound) * preset.chunk_latents
            cos, sin = (table.to(self.device) for table in rope_tables(preset.dit, [float(way)], (1, 1)))
            for kv in past[visible.index(bound) :: seen]:
                kv[story, 0] = apply_rope(kv[story, 0], cos, sin)
        return (*found[: 2 + layers], *past)

    def look_at(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Flow loss [B] of a chunk given the data before it, and where attention falls, [B, L, R]; means over levels."""
        x0, eps, fixed = self.given[chunk].to(self.device).transpose(1, 2), self.noise(chunk), self.fixed(chunk)
        losses, self.weigher.masses = [], []
        for step in UniPC(schedule_of(self.sampling.steps, self.sampling.shift)).steps:
            noisy = torch.lerp(x0, eps, step.sigma)
            with self.autocast():
                velocity = self.plain.look(*self.inputs(noisy, step.timestep), *fixed)
            losses.append((velocity - (eps - x0)).square().mean((1, 2, 3, 4)))
        mass_SLBK = torch.stack(self.weigher.masses).unflatten(0, (len(losses), -1))
        return torch.stack(losses).mean(0), torch.einsum("slbk,bkr->blr", mass_SLBK / len(losses), self.roles(chunk))

    def roles(self, chunk: int) -> Tensor:
        """Which role each visible block has in each story, one-hot [B, K, R]."""
        return torch.stack([self._roles(plans, chunk) for plans in self.plans]).to(self.device)

    def _roles(self, plans: Sequence[Any], chunk: int) -> Tensor:
        sinks, bound = SINKS[self.sampling.sinks], plans[chunk - 1].after.shot if chunk else None
        names: list[int] = []
        for block in plans[chunk].visible:
            shot = sinks.shot and block == bound
            first = sinks.globally and block == 0
            names.append(3 if block == chunk else 0 if first else 1 if shot else 2)
        return torch.eye(len(ROLES))[names]


@torch.no_grad()
def probe(models: Models, eyes: Eyes, stories: Sequence[Story], cache: str = "nvfp4") -> dict[str, Any]:
    """For each of CONDITIONS, of the chunks of the return: loss asked and told, and attention by layer and role.

    Returns JSON: {condition: {"asked": [a value a chunk], "told": [...], "unread": mean of asked - told at the cut,
    "unread_error": its standard error over stories, "mass": [chunk][layer][role]}}.
    """
    data = torch.cat(encoded(eyes, models, stories), 1)
    named = [Story((*story.shots[:-1], replace(story.shots[-1], named=True))) for story in stories]
    found: dict[str, Any] = {"stories": len(stories), "roles": list(ROLES)}
    for name, (sinks, near) in CONDITIONS.items():
        sampling = Sampling(LEVELS, 1.0, models.preset.sampling.shift, cache, sinks)
        asked, mass = returned(Probe(models, stories, sampling, eyes, data), near)
        told, _ = returned(Probe(models, named, sampling, eyes, data), near)
        unread = (asked - told)[0]
        error = float(unread.std() / len(unread) ** 0.5) if len(unread) > 1 else 0.0
        found[name] = {
            "asked": losses_of(asked.mean(1)),
            "told": losses_of(told.mean(1)),
            "unread": float(unread.mean()),
            "unread_error": error,
            "unread_by_story": losses_of(unread),
            "mass": [[rounded(row) for row in chunk] for chunk in mass.mean(1)],
        }
    return found


def returned(rollout: Probe, near: int | None) -> tuple[Tensor, Tensor]:
    """Losses [LAST, B] and attention [LAST, B, L, R] of the last chunks; `near` holds for these looks only."""
    total = len(rollout.scripts[0].prompts)
    looks = []
    for chunk in range(total):
        if chunk >= total - LAST:
            rollout.near = near
            looks.append(rollout.look_at(chunk))
            rollout.near = None
        if chunk + 1 < total:
            rollout.generate(chunk)
    losses, masses = zip(*looks)
    return torch.stack(losses).cpu(), torch.stack(masses).cpu()


def losses_of(values: Tensor) -> list[float]:
    """With the digits that their differences need."""
    return [round(value, 6) for value in values.tolist()]
