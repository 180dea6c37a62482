"""What a step of distillation is on: prompts and cuts of encoded stories, with noise of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtake.training.data.latent_cache import LatentCache
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.rollout import Story
from longtake.training.objective.accumulate import rows_of
from longtake.training.objective.teacher_forcing import Clips
from longtake.training.stages.precompute import Stories


@dataclass(frozen=True)
class Scene:
    """A batch to distil on. clips: of the data, whose latents matter for given frames only. story: what is generated.
    learnt: how many of its last chunks are learnt on."""

    clips: Clips
    story: Story
    exit_step: int
    learnt: int

    def part(self, rows: slice) -> Scene:
        """Some of its stories."""
        story = self.story
        first = None if story.first is None else story.first[rows]
        own = Story(story.embeddings[rows], story.cuts[rows], story.noise[rows], first)
        return Scene(rows_of(self.clips, rows), own, self.exit_step, self.learnt)


class SceneSampler:
    """Draws scenes from stories; all randomness comes from the generators given."""

    def __init__(
        self, stories: Stories, options: DistillOptions, embed: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        """`embed`: tokens int32 [P, E] -> fp32 embeddings [P, E, dim], without gradient."""
        self.stories, self.options, self.embed, self.device = stories, options, embed, device
        self.cuts: list[list[bool]] = [
            [False, *later] for _, *later in stories.cuts.tolist()
        ]  # a video's first is none

    def random(self, host: torch.Generator, own: torch.Generator) -> Scene:
        """Prompts and cuts of one length and one exit step for all of them, drawn by `host`; noise by `own`, which
        `host` seeds."""
        options = self.options
        learnt = options.chunks[int(torch.randint(len(options.chunks), (), generator=host))]
        index = torch.randint(len(self.stories), (options.accumulate * options.batch,), generator=host)
        exit_step = int(torch.randint(options.student_steps, (), generator=host))
        own.manual_seed(int(torch.randint(2**62, (), generator=host)))
        chunks = learnt
        if options.rollout:
            chunks = options.rollout[int(torch.randint(len(options.rollout), (), generator=host))]
        return self.of(index, chunks, exit_step, own, learnt)

    def of(
        self, index: Tensor, chunks: int, exit_step: int, generator: torch.Generator, learnt: int | None = None
    ) -> Scene:
        """The prompts and cuts of stories `index`, which is on the host, with noise of `generator`. learnt: all if None."""
        in_memory = isinstance(self.stories, LatentCache)
        clips = self.stories.clips(index.to(self.device, non_blocking=True) if in_memory else index, chunks)
        cuts = [self.cuts[i][:chunks] for i in index.tolist()]
        given = torch.zeros(clips.latents.shape[:2], dtype=torch.bool, device=self.device)
        given[:, 0] = True
        clips = replace(clips, given=given if self.options.i2v else None)
        embeddings = self.embed(clips.tokens.flatten(0, 1)).unflatten(0, clips.tokens.shape[:2])
        noise = torch.randn(clips.latents.shape, generator=generator, device=generator.device).to(self.device)
        first = clips.latents[:, 0] if self.options.i2v else None
        return Scene(clips, Story(embeddings, cuts, noise, first), exit_step, learnt or chunks)
