"""The batches of stage "dit": random stories, or the next ones in order where they are on disk, all of one length."""

from __future__ import annotations

from typing import Any

import torch

from longtake.training.data.latent_cache import LatentCache
from longtake.training.objective.teacher_forcing import Clips
from longtake.training.stages.options import StageOptions
from longtake.training.stages.precompute import Stories


class BatchSampler:
    """Draws lengths and stories; all randomness comes from the generators given. `batch_name`: of the latest batch."""

    def __init__(self, stories: Stories, options: StageOptions, device: torch.device) -> None:
        self.stories, self.options, self.device = stories, options, device
        self.batch_name = ""

    def shape(self, generator: torch.Generator) -> tuple[int, int]:
        """How many stories, all cut to how many chunks: a random length; the shorter, the more of them."""
        choices = self.options.chunks
        chunks = choices[int(torch.randint(len(choices), (), generator=generator))]
        return self.options.batch * max(choices) // chunks, chunks

    def random(self, generator: torch.Generator, parts: int = 1) -> Clips:
        """Random stories of one length, so many times as many."""
        size, chunks = self.shape(generator)
        index = torch.randint(len(self.stories), (parts * size,), generator=generator)
        self.batch_name = f"stories {index.tolist()}"
        return self.stories.clips(index.to(self.device, non_blocking=True), chunks)

    def next(self, generator: torch.Generator) -> Clips:
        """What the next step trains on."""
        if isinstance(self.stories, LatentCache):
            return self.random(generator, self.options.accumulate)
        size, chunks = self.shape(generator)
        clips = self.stories.take(self.options.accumulate * size, chunks)
        self.batch_name = self.stories.batch_name
        return clips

    def position(self) -> dict[str, Any]:
        """The place in the data, for resume points; random batches have none."""
        return {} if isinstance(self.stories, LatentCache) else self.stories.position()

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from there."""
        if not isinstance(self.stories, LatentCache):
            self.stories.seek(position)
