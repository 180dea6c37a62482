"""What is generated of held-out stories, and which shot a chunk belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from longtake.training.data.digit_stories import Shot, Story
from longtake.training.data.digits import chunk_prompts
from longtake.training.experiment.batched import Script


def scripts_of(stories: Sequence[Story], seed: int, first: int = 0) -> list[Script]:
    """What is generated of each story: its prompts and cuts, and a noise of its own. The first has number `first`."""
    made = []
    for number, story in enumerate(stories, first):
        prompts, cuts = chunk_prompts(story)
        made.append(Script(tuple(prompts), tuple(cuts), seed * 100_003 + number))
    return made


def shots_by_chunk(story: Story) -> list[Shot]:
    """The shot (or part of one) that each chunk belongs to."""
    return [shot for shot in story.shots for _ in range(shot.chunks)]
