"""Handwritten digits as a multi-shot data set that needs no download: stories, captions, and the sampler.

The subjects are the real 8x8 scans that scikit-learn ships. A subject that returns after a cut is the same scan, so
identity across shots can be judged. Every fifth scan is held out for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from longtake.training.data.base import Batch, Take, chunk_frames, item_generator
from longtake.training.data.digit_stories import Shot, Story, load_scans
from longtake.training.data.facts import Facts
from longtake.training.data.shards import key_of
from longtake.training.models.presets import Preset
from longtake.training.models.text.grammar import BACKGROUNDS, COLOURS, DIGITS, LIGHTS, MOTIONS, caption_words
from longtake.training.models.wan.prompts import with_cut_prefix

LEFT_OUT = 0.85  # how often `returning_story` leaves a known subject's colour out
T = TypeVar("T")


@lru_cache
def scans_of(digit: int, split: str) -> tuple[int, ...]:
    """Indices of the scans of one class; every fifth scan is for "eval", the others for "train"."""
    _, classes = load_scans()
    return tuple(int(i) for i in np.flatnonzero(classes == digit) if (i % 5 == 0) == (split == "eval"))


def caption(shot: Shot) -> str:
    """The shot in the data set's grammar, such as "a green seven drifts left over a sea background, soft light"."""
    subject = f"{shot.colour} {DIGITS[shot.digit]}" if shot.named else DIGITS[shot.digit]
    article = "an" if subject[0] in "aeiou" else "a"
    return f"{article} {subject} {shot.motion} over a {shot.background} background, {shot.light}"


def chunk_prompts(story: Story) -> tuple[list[str], list[bool]]:
    """Prompt and cut flag of each chunk; a cut is the first chunk of every shot but the first and the joined."""
    prompts, cuts = [], []
    for number, shot in enumerate(story.shots):
        for chunk in range(shot.chunks):
            cuts.append(number > 0 and chunk == 0 and not shot.joined)
            prompts.append(with_cut_prefix(caption(shot), cuts[-1]))
    return prompts, cuts


def random_story(generator: torch.Generator, chunks: int, split: str = "train", changes: bool = True) -> Story:
    """A story of `chunks` chunks: up to three shots of one or two subjects (of different classes).

    With `changes`, in one of three shots with room for it the subject changes colour, or the light changes, half-way.
    """
    draw = Draw(generator)
    lengths = _shot_lengths(draw, chunks)
    first = draw.pick(range(10))
    second = (first + 1 + draw.pick(range(9))) % 10
    cast = [(digit, draw.pick(scans_of(digit, split)), draw.pick(COLOURS)) for digit in (first, second)]
    shots: list[Shot] = []
    for number, length in enumerate(lengths):
        digit, scan, colour = cast[draw.pick((0, 0, 1)) if number else 0]
        colour = draw.pick(COLOURS) if draw.unit() < 0.25 else colour
        shot = random_shot(draw, digit, scan, colour, length, shots[-1] if shots else None)
        shots += _changed_half_way(draw, shot) if changes and length > 1 and draw.unit() < 1 / 3 else [shot]
    return Story(tuple(shots))


def returning_story(generator: torch.Generator, chunks: int, split: str = "train", changes: bool = True) -> Story:
    """A story whose prompts often leave out a subject's colour once it was seen: what it is, the past must tell.

    Of those with room for it, two in five have one form: a subject, another one for at least three chunks (a window of
    four then holds nothing else, but for its sinks), and the first again. Two in five show two subjects in turn, in short
    shots, so that almost every cut asks for a subject that the window still holds. The rest are as `random_story` draws them.
    """
    draw = Draw(generator)
    form = draw.pick(("there and back", "there and back", "in turn", "in turn", "random"))
    if chunks >= 3 and form == "in turn":
        shots = _in_turn(draw, chunks, split)
    elif chunks >= 5 and form == "there and back":
        last = draw.pick((1, 2)) if chunks > 5 else 1
        middle = draw.pick(range(3, chunks - last))
        shots = _there_and_back(draw, (chunks - middle - last, middle, last), split)
    else:
        shots = list(random_story(generator, chunks, split, changes).shots)
    told: list[Shot] = []
    for shot in shots:
        known = {earlier.digit: earlier.colour for earlier in told}
        left_out = known.get(shot.digit) == shot.colour and draw.unit() < LEFT_OUT
        told.append(replace(shot, named=not left_out))
    return Story(tuple(told))


def _there_and_back(draw: Draw, lengths: Sequence[int], split: str) -> list[Shot]:
    """A subject, another of another class and colour, the first again."""
    one, other = _two_subjects(draw, split)
    return _shots(draw, (one, other, one), lengths)


def _in_turn(draw: Draw, chunks: int, split: str) -> list[Shot]:
    """Two subjects in turn, a chunk or two at a time."""
    lengths: list[int] = []
    while (left := chunks - sum(lengths)) > 0:
        lengths.append(min(left, draw.pick((1, 1, 2))))
    cast = _two_subjects(draw, split)
    return _shots(draw, [cast[number % 2] for number in range(len(lengths))], lengths)


def _two_subjects(draw: Draw, split: str) -> tuple[tuple[int, int, str], tuple[int, int, str]]:
    """Digit, scan and colour of two subjects of different classes and colours."""
    first = draw.pick(range(10))
    second = (first + 1 + draw.pick(range(9))) % 10
    colour = draw.pick(COLOURS)
    other = draw.pick([c for c in COLOURS if c != colour])
    return (first, draw.pick(scans_of(first, split)), colour), (second, draw.pick(scans_of(second, split)), other)


def _shots(draw: Draw, cast: Sequence[tuple[int, int, str]], lengths: Sequence[int]) -> list[Shot]:
    """A shot of so many chunks of each subject; the background changes at every cut."""
    shots: list[Shot] = []
    for subject, length in zip(cast, lengths):
        shots.append(random_shot(draw, *subject, length, shots[-1] if shots else None))
    return shots


def _changed_half_way(draw: Draw, shot: Shot) -> list[Shot]:
    """The shot in two joined parts, the second in another colour or light."""
    first = replace(shot, chunks=shot.chunks // 2)
    rest = replace(shot, chunks=shot.chunks - first.chunks, joined=True)
    if draw.unit() < 0.5:
        return [first, replace(rest, colour=draw.pick([c for c in COLOURS if c != shot.colour]))]
    return [first, replace(rest, light=draw.pick([light for light in LIGHTS if light != shot.light]))]


class Digits:
    """The data set of random stories, rendered on the device that asks for them. draw: see `random_story`."""

    def __init__(self, preset: Preset, split: str = "train", draw: Callable[..., Story] = random_story) -> None:
        self.preset, self.split, self.draw = preset, split, draw

    @property
    def line(self) -> str:
        """Nothing to say: it is endless."""
        return ""

    def lacking(self, chunks: int = 0, frames: int = 0) -> str:
        """Nothing: stories are drawn as long as they are asked for."""
        return ""

    @property
    def captions(self) -> list[str]:
        """The words of the grammar."""
        return [" ".join(caption_words())]

    def sample(self, generator: torch.Generator, chunks: int, batch: int, device: torch.device) -> Batch:
        """Draw `batch` stories of `chunks` chunks."""
        stories = [self.draw(generator, chunks, self.split) for _ in range(batch)]
        prompts, cuts = zip(*(chunk_prompts(story) for story in stories))
        return Batch(self.render(stories, device), list(prompts), list(cuts))

    def take(self, index: int, seed: int, chunks: int, known: Container[str] = ()) -> Take:
        """Story `index` of `seed`, rendered on the CPU unless its key is known."""
        story = self.draw(item_generator(seed, index), chunks, self.split)
        key = key_of("digits", self.preset.height, self.preset.width, self.preset.fps, story)
        frames = None
        if key not in known:
            video_3THW = self.render([story], torch.device("cpu"))[0]
            frames = video_3THW.mul(127.5).add_(127.5).round_().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        return Take(key, frames, *chunk_prompts(story), Facts())

    def clips(self, generator: torch.Generator, frames: int, batch: int, device: torch.device) -> Tensor:
        """Draw `batch` clips of `frames` frames, each from a story of its own; two in five have a cut.

        They begin on a multiple of the VAE's temporal stride, so that a cut falls where it falls in a story: between
        two latents.
        """
        stride = self.preset.vae.stride[0]
        chunks = 2 + frames // (self.preset.chunk_latents * stride)
        stories = [self.draw(generator, chunks, self.split) for _ in range(batch)]
        room = (chunk_frames(self.preset, chunks) - frames) // stride
        starts = (stride * torch.randint(room + 1, (batch,), generator=generator)).tolist()
        return self.render(stories, device, frames, starts)

    def render(
        self,
        stories: Sequence[Story],
        device: torch.device,
        frames: int | None = None,
        starts: Sequence[int] | None = None,
    ) -> Tensor:
        """Render stories (whole, or `frames` frames from each one's start), fp32 [B,3,T,H,W] in [-1,1]."""
        from longtake.training.data.render import render_stories

        if frames is None:
            frames = chunk_frames(self.preset, stories[0].chunks)
        return render_stories(stories, self.preset, device, frames, starts or [0] * len(stories))


class Draw:
    """Draws from a torch generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def unit(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def pick(self, items: Sequence[T]) -> T:
        return items[int(torch.randint(len(items), (), generator=self.generator))]


def _shot_lengths(draw: Draw, chunks: int) -> list[int]:
    """Lengths of one to three shots that sum to `chunks`, two chunks a shot or more where there is room."""
    count = min(draw.pick((1, 2, 2, 3, 3)), chunks, max(2, chunks // 2))
    lengths = [chunks // count] * count
    for _ in range(chunks - sum(lengths)):
        lengths[draw.pick(range(count))] += 1
    return lengths


def random_shot(draw: Draw, digit: int, scan: int, colour: str, chunks: int, previous: Shot | None) -> Shot:
    """A shot of the given subject; after a cut the background is never the one before."""
    others = [name for name in BACKGROUNDS if previous is None or name != previous.background]
    return Shot(
        digit,
        scan,
        colour,
        motion=draw.pick(MOTIONS),
        background=draw.pick(others),
        light=draw.pick(LIGHTS),
        chunks=chunks,
        x=2 * draw.unit() - 1,
        y=2 * draw.unit() - 1,
        phase=draw.unit(),
        speed=0.85 + 0.3 * draw.unit(),
    )
